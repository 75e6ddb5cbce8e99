"""Arrangements: ways to build the FFN sublayer from one or more blocks."""

from fairseq_smoe.moe.kind import Kind


class Arrangement(Kind):
    """A way to build the FFN sublayer of a layer from blocks.

    Several may be chosen. Each gets, as ``make_block``, the function that builds the sublayer of
    the arrangements before it.
    """

    @classmethod
    def is_chosen(cls, options):
        """Whether the options of the model choose it: by name, or by a flag of its own if it has
        one."""
        return cls.name in (options.moe_arrangement or "").split(",")

    @classmethod
    def arrange(cls, make_block, embed_dim, ffn_dim, options, **ffn_options):
        """Build the sublayer.

        Args:
            make_block: ``make_block(embed_dim, ffn_dim, **changes)`` returns a block.
            embed_dim, ffn_dim: sizes of the layer.
            options: of the class's ``Options``.
            ffn_options: ``dropout``, ``activation_dropout`` and ``activation_fn`` of the model.

        Returns:
            A module that is called like a :class:`~fairseq_smoe.moe.block.SMoEBlock`. A module that
            wraps a block has it as its attribute ``block``.
        """
        raise NotImplementedError
