import os
import sys

from .runner.main import main

sys.path.insert(0, os.getcwd())  # a task class of the user's own may lie in the folder where the command is given
main()
