"""Where the plugin is installed."""

from pathlib import Path


def add_arguments(parser):
    pass


def run(args):
    print(Path(__file__).parent)
