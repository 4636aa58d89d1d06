"""`python -m fedpeft_dist` is `fedpeft`."""


def main() -> None:
    try:
        from fedpeft_dist.cli import main as run_command
    except KeyboardInterrupt:  # nothing has begun that it could interrupt
        raise SystemExit(1) from None
    run_command()


if __name__ == "__main__":
    main()
