"""The Ray Serve application that answers for one bundle; `raylway.bundle` and what is below it are all it needs."""
