"""``python -m shear_tools``: the command line."""

from shear_tools.cli import main

if __name__ == "__main__":
    main()
