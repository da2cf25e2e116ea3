"""`python -m miaotui.cli`, where the entry point is not on the path."""

from miaotui.cli import main

main()
