"""`python -m detbackbones` is the program `detbackbones`."""

from .cli.main import main

if __name__ == "__main__":
    main()
