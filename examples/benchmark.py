"""`capt-peft benchmark`, as a script: `accelerate launch examples/benchmark.py ...`."""

from capt_peft.commands import main

if __name__ == "__main__":
    main("benchmark")
