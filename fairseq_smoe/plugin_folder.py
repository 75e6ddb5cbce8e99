"""Where the plugin is installed: the folder to give to ``--user-dir``."""

from pathlib import Path

PLUGIN_FOLDER = Path(__file__).parent
