"""`python -m capt_peft COMMAND`, and `accelerate launch -m capt_peft train ...`."""

from .commands import main

if __name__ == "__main__":
    main()
