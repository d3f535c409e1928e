"""Texts that a value of the config may be given on a command line, or in a file of somebody else."""

HUGE = "1" + "0" * 30
TEXTS = """no off 'false' "'no'" true yes 0 1 -1 2.5 1e-3 "'1e-3'" 1e400 nan inf -inf null '' "''" [] [1,2] [a] [null]
{} {a:1} {a:{b:[1]}} {_target_:os.system,command:true} [{_target_:os.system}] [{a:1},{b:2}] 0x10 1_000 1e3 ١٢ ünïcödé☃
a=b [ } ( \\ $ # ~ ~/x ${ ${nowhere.key} ${seed} ${oc.env:HOME} ${oc.env:NOWHERE} ${oc.env:NOWHERE,3} ${train} ${now:%Y}
${hydra:runtime.cwd} choice(1,2) range(3) interval(0,1) shuffle(1,2) int(3) float(x) glob(*) 1,2 a,b a,,b , 007"""
VALUES = TEXTS.split()
VALUES += [
    HUGE,
    f"-{HUGE}",
    "a b",
    "it's",
    '"a" "b"',
    "'a",
    "x" * 5000,
    "[" * 200 + "]" * 200,
    "9" * 5000,
    "a\tb",
    "a\nb",
]
