"""Arrangements: ways to build the FFN sublayer from one or more blocks."""

from fairseq_smoe.moe.kind import Kind


class Arrangement(Kind):
    """A way to build the FFN sublayer of a layer from blocks.

    Several arrangements may be chosen. The first gets a function that makes plain blocks; each of
    the others gets the function that builds the sublayer of the arrangements before it.
    """

    @classmethod
    def is_chosen(cls, options):
        """Whether the options of the model choose this arrangement, by its name or by a flag of
        its own."""
        return cls.name in (options.moe_arrangement or "").split(",")

    @classmethod
    def arrange(cls, make_block, embed_dim, ffn_dim, options, **ffn_options):
        """Build the sublayer.

        Args:
            make_block: ``make_block(embed_dim, ffn_dim, **changes)`` returns a block.
            embed_dim, ffn_dim: sizes of the layer.
            options: an object of the class's ``Options``.
            ffn_options: ``dropout``, ``activation_dropout`` and ``activation_fn`` of the model.

        Returns:
            A module that is called like a :class:`~fairseq_smoe.moe.block.SMoEBlock`. If it wraps
            a block, its attribute ``block`` is that block. If it calls this block with parts of
            tokens, its attribute ``heads`` is their number, as is that of the
            :class:`~fairseq_smoe.moe.block.BlockStats` that it returns.
        """
        raise NotImplementedError
