"""``python -m fusion`` is ``fusion_bench``."""

from fusion.cli import main

if __name__ == "__main__":
    main()
