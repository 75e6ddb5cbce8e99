"""A plugin of pytest (``-p register_plugin``) that registers ours with fairseq. The variable ORDER
says when: "before" or "after" fairseq's training loop is imported, or "without"."""

import os

order = os.environ["ORDER"]
if order == "after":
    import fairseq_cli.train  # noqa: F401
if order != "without":
    import fairseq  # noqa: F401

    import fairseq_smoe

    fairseq_smoe.register()
