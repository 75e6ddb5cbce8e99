"""What stands around blocks, or puts another in their place."""

from fairseq_smoe.moe.kind import Kind


class Arrangement(Kind):
    """A way to build the FFN sublayer of a layer from blocks.

    Several may be chosen: each gets what makes the blocks of those before it.
    """

    @classmethod
    def is_chosen(cls, options):
        """Whether the options of the model ask for it: by name, unless it has a flag of its own."""
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
            A module that is called like a :class:`~fairseq_smoe.moe.block.SMoEBlock`; one that
            holds a block has it as ``block``.
        """
        raise NotImplementedError
