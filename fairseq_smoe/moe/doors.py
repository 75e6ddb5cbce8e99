"""Finding gates, kinds of experts and arrangements by name, and building FFN sublayers of them."""

import importlib
import pkgutil
import sys
from functools import partial

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe import arrangements, expert_kinds, gates
from fairseq_smoe.moe.arrangement import Arrangement
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.experts import Experts
from fairseq_smoe.moe.gate import Gate
from fairseq_smoe.moe.pass_scale import parse_pass_scale
from fairseq_smoe.moe.strata import split_width

# flag -> base class of the kinds it chooses, and the package with the project's own
DOORS = {
    "--moe-gate": (Gate, gates),
    "--moe-experts": (Experts, expert_kinds),
    "--moe-arrangement": (Arrangement, arrangements),
}


def named_kinds(flag):
    """``{name: class}`` of the project's own kinds, sorted by name."""
    base, folder = DOORS[flag]
    modules = {m.name for m in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}.")}
    for name in modules:
        importlib.import_module(name)
    found = {kind.name: kind for kind in _subclasses(base) if kind.__module__ in modules}
    return dict(sorted(found.items()))


def all_kinds():
    """The project's own classes, and those in any other module that has been imported."""
    for flag in DOORS:
        named_kinds(flag)
    return [kind for base, _ in DOORS.values() for kind in _subclasses(base)]


def _subclasses(base):
    return [kind for child in base.__subclasses__() for kind in (child, *_subclasses(child))]


def find_kind(flag, name):
    """The class with a name, or the user's own class for ``module:Class``.

    The name may come from a checkpoint, so no module is imported here. The module of a user's own
    class has to be imported already.

    Raises:
        OptionError: there is no such class, or its module has not been imported.
    """
    kinds = named_kinds(flag)
    if name in kinds:
        return kinds[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise OptionError(
            f"{flag} {name}: expected {' or '.join(kinds)}, or module:Class for one of your own"
        )
    module = sys.modules.get(module_name)
    if module is None:
        raise OptionError(
            f"{flag} {name}: the model needs this class, but loading a checkpoint imports no "
            f"modules by itself; if you trust the module, add --moe-modules {module_name}"
        )
    kind = getattr(module, class_name, None)
    base, _ = DOORS[flag]
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise OptionError(
            f"{flag} {name}: {module_name} has no class {class_name} that is a {base.__name__} of "
            f"{base.__module__}"
        )
    return kind


def chosen_arrangements(options):
    """The arrangements that the options ask for, innermost first."""
    chosen = [kind for kind in named_kinds("--moe-arrangement").values() if kind.is_chosen(options)]
    for name in filter(None, (options.moe_arrangement or "").split(",")):
        kind = find_kind("--moe-arrangement", name)
        if kind not in chosen:
            chosen.append(kind)
    return chosen


def check_kinds(options, strata):
    """Check the options of all kinds of this project, and of the user's own that are chosen.

    Raises:
        OptionError: an option is wrong (see :meth:`~fairseq_smoe.moe.kind.KindOptions.check`), or
            the name of a kind is.
    """
    kinds = [kind for flag in DOORS for kind in named_kinds(flag).values()]
    kinds.append(find_kind("--moe-gate", options.moe_gate))
    kinds.append(find_kind("--moe-experts", options.moe_experts))
    for kind in dict.fromkeys([*kinds, *chosen_arrangements(options)]):
        kind.Options.of(options).check(strata, options)


def pool_of(options, strata):
    """Sizes of the strata that blocks have, which are larger than ``strata`` if the gates may add
    experts."""
    gate = find_kind("--moe-gate", options.moe_gate)
    return gate.pool(strata, gate.Options.of(options))


def build_sublayer(embed_dim, ffn_dim, options, strata, group=None, ffn_split=1, **ffn_options):
    """The FFN sublayer that the options ask for: a block, or an arrangement of blocks.

    Args:
        options: all options of the model, named as the flags.
        strata: experts of each stratum at the start; see :func:`pool_of`.
        group: :class:`~fairseq_smoe.moe.expert_group.ExpertGroup`, or None.
        ffn_split: number of experts among which a hidden size of ``ffn_dim`` is divided; ``strata``
            counts these.
        ffn_options: ``dropout``, ``activation_dropout``, ``activation_fn``.
    """
    gate = find_kind("--moe-gate", options.moe_gate)
    experts = find_kind("--moe-experts", options.moe_experts)
    make = partial(
        _make_block,
        ffn_split=ffn_split,
        strata=pool_of(options, strata),
        alive=strata,
        norm=options.smoe_norm,
        pass_scale=parse_pass_scale(getattr(options, "smoe_pass_scale", None), strata),
        pass_curriculum=getattr(options, "smoe_pass_curriculum", 0),
        eom=options.moe_eom,
        expert_group=group,
        make_gate=partial(_make_gate, gate, options),
        make_experts=partial(experts, options=experts.Options.of(options)),
        expert_ffn_dim=getattr(options, "moe_ffn_dim", None),
        **ffn_options,
    )
    for kind in chosen_arrangements(options):
        make = partial(_arranged, kind, make, kind.Options.of(options), ffn_options)
    return make(embed_dim, ffn_dim)


def _make_gate(kind, options, embed_dim, num_experts):
    gate = kind(embed_dim, num_experts, kind.Options.of(options))
    if getattr(options, "moe_gate_bias", False):  # not in checkpoints of earlier versions
        gate.add_bias()
    return gate


def _make_block(
    embed_dim, ffn_dim, ffn_split, expert_ffn_dim=None, block_class=SMoEBlock, **options
):
    return block_class(embed_dim, split_width(expert_ffn_dim or ffn_dim, ffn_split), **options)


def _arranged(kind, make_block, options, ffn_options, embed_dim, ffn_dim, **changes):
    make_block = partial(make_block, **changes)
    return kind.arrange(make_block, embed_dim, ffn_dim, options, **ffn_options)
