"""Where the plugin is installed."""

from fairseq_smoe.plugin_folder import PLUGIN_FOLDER


def add_arguments(parser):
    pass


def run(args):
    print(PLUGIN_FOLDER)
