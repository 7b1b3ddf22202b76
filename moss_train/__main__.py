"""`python -m moss_train`."""

from moss_train.cli.main import run_program

if __name__ == "__main__":
    run_program()
