"""``python -m nearfield`` and ``accelerate launch -m nearfield`` are the command ``nearfield``."""

from nearfield.cli import main

if __name__ == "__main__":
    main()
