"""Where the plugin is installed."""

from pathlib import Path

PLUGIN_FOLDER = Path(__file__).parent


def add_arguments(parser):
    pass


def run(args):
    print(PLUGIN_FOLDER)
