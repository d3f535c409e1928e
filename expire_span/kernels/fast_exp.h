// exp for loops that compilers vectorize.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

// A relative error of 2e-7; 0 below e^-87.
inline float fast_exp(float x) {
  const float clamped = std::min(std::max(x, -87.0f), 88.0f), power = std::nearbyint(clamped * 1.44269504f);
  const float r = clamped - power * 0.693359375f + power * 2.12194440e-4f;  // ln 2 in two parts
  float y = 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + c;
  const float scale = std::bit_cast<float>((static_cast<int32_t>(power) + 127) << 23);  // 2^power
  return x < -87.0f ? 0.0f : (y * r * r + r + 1.0f) * scale;
}
inline double fast_exp(double x) { return std::exp(x); }
