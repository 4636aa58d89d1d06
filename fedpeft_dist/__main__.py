"""`python -m fedpeft_dist` is `fedpeft`."""

import gc


def main() -> None:
    # Imports make hundreds of thousands of objects and leave little garbage; looking for it takes a quarter of their
    # time. `runtime.process.start` sets the usual threshold again.
    gc.set_threshold(100_000)
    try:
        from fedpeft_dist.cli import main as run_command
    except KeyboardInterrupt:  # nothing has begun that it could interrupt
        raise SystemExit(1) from None
    run_command()


if __name__ == "__main__":
    main()
