"""``python -m shear_ir``: the command line."""

from shear_ir.cli import main

if __name__ == "__main__":
    main()
