"""`python -m spkv.cli`, for launchers that take a module (torchrun, accelerate)."""

from spkv.cli import main

if __name__ == "__main__":
    main()
