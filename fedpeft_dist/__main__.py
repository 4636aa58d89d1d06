"""`python -m fedpeft_dist` is `fedpeft`."""

from fedpeft_dist.cli import main

if __name__ == "__main__":
    main()
