"""What is changed in fairseq's programs and classes that translate. :func:`apply` is called once,
when the plugin is loaded."""

from fairseq_smoe.generation import hub


def apply():
    hub.use_for_our_task()
