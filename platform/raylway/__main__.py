"""`python -m raylway`, for places where the package is on the path but not installed, such as a Ray job."""

from raylway.cli import main

main()
