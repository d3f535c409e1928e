"""A job of submitit, as hydra-submitit-launcher submits it: after a pre-emption it starts anew with its arguments."""

import sys

import submitit

from expire_span.runner.cli import main


class TrainingJob:
    def __call__(self, *arguments):
        sys.argv[1:] = arguments
        main()

    def checkpoint(self, *arguments):
        return submitit.helpers.DelayedSubmission(self, *arguments)
