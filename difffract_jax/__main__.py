"""`python -m difffract_jax`: the command line, also where the script `difffract` is on no path."""

from difffract_jax.cli.main import main

if __name__ == "__main__":
    main()
