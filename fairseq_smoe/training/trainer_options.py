"""fairseq's options that do not go together with what the trainer does."""

import logging

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.criterion import MoELabelSmoothedCrossEntropy
from fairseq_smoe.translation.layers import expert_layers
from fairseq_smoe.translation.train_only import trains_rows

logger = logging.getLogger(__name__)


def warn_without_gate_losses(cfg, criterion, model):
    """Warn if the gates of a model are trained without their losses; nothing else shows it."""
    if expert_layers(model) and not isinstance(criterion, MoELabelSmoothedCrossEntropy):
        name = getattr(cfg.criterion, "_name", None) or type(criterion).__name__
        logger.warning(
            f"--criterion {name}: trains the gates without their balance loss, so that a few "
            "experts may get all tokens; --criterion moe_label_smoothed_cross_entropy adds the loss"
        )


def choose_backend_for_dropped_layers(cfg):
    """torch's wrapper waits for the gradients of all layers. It can look for those that the output
    depends on, but would not find gates whose gradient comes from their loss alone.

    Args:
        cfg: fairseq's options for distributed training.

    Raises:
        OptionError: with fully_sharded, which has to run every layer.
    """
    if cfg.ddp_backend == "fully_sharded":
        raise OptionError(
            "--encoder-layerdrop or --decoder-layerdrop with --ddp-backend fully_sharded: not "
            "possible; drop no layers, or choose legacy_ddp"
        )
    if cfg.ddp_backend in ("pytorch_ddp", "c10d"):
        logger.info(f"--ddp-backend {cfg.ddp_backend} with dropped layers: using legacy_ddp")
        cfg.ddp_backend = "legacy_ddp"


def _check_train_only(cfg, group):
    """Rows of a parameter are frozen by gradients of zero."""
    text = getattr(cfg.model, "train_only", None)
    if not text or not trains_rows(text):
        return
    decay = getattr(cfg.optimizer, "weight_decay", 0)
    if decay:
        raise OptionError(
            f"--weight-decay {decay} with --train-only {text}: would change the rows that are not "
            "trained; leave --weight-decay out"
        )
    if group is not None and "experts" in text:
        raise OptionError(
            f"--train-only {text} with --moe-expert-parallel-size {group.size}: a process has only "
            "some of the experts; train with --moe-expert-parallel-size 1"
        )


def check_options(cfg, group):
    """Refuse options that do not work with sharded experts or with fully_sharded.

    Raises:
        OptionError: names the options.
    """
    asked = getattr(cfg.model, "moe_expert_parallel_size", None)
    backend = cfg.distributed_training.ddp_backend
    noise = getattr(cfg.model, "quant_noise_pq", 0) if hasattr(cfg.model, "moe_freq") else 0
    if noise and cfg.distributed_training.distributed_world_size > 1 and not _keeps_copies(cfg):
        raise OptionError(
            f"--quant-noise-pq {noise} with several processes: each would change the weights by "
            "its own noise; train in one process, or with --fp16 or --bf16"
        )
    if backend == "fully_sharded" and cfg.common.bf16:
        raise OptionError("--bf16 with --ddp-backend fully_sharded: not possible; use --fp16")
    if backend == "fully_sharded":  # joins parameters, which it can train or skip only together
        for name, default in (
            ("pesc_freeze", "none"),
            ("mpo_central_mask_prob", 0),
            ("moefy_experts", 0),
            ("train_only", None),
        ):
            value = getattr(cfg.model, name, default)
            if value != default:
                raise OptionError(
                    f"--{name.replace('_', '-')} {value} with --ddp-backend fully_sharded: not "
                    "possible; use another backend"
                )
    _check_train_only(cfg, group)
    if group is None:
        if asked is not None and asked > 1:
            raise OptionError(
                f"--moe-expert-parallel-size {asked}: this training has 1 process, or no experts; "
                f"start more with torchrun --nproc_per_node {asked}, or leave the option out"
            )
        return
    shared = f"--moe-expert-parallel-size {group.size}"
    if cfg.common.amp:
        raise OptionError(f"--amp with {shared}: ranks could skip different updates; use --bf16")
    if getattr(cfg.optimizer, "_name", None) == "adafactor":
        raise OptionError(f"--optimizer adafactor with {shared}: not possible; use adam, or size 1")
    not_with_shared = {
        "--store-ema": cfg.ema.store_ema,
        "--quantization-config-path": cfg.common.quantization_config_path,
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--zero-sharding os": cfg.distributed_training.zero_sharding == "os",
    }
    for option, given in not_with_shared.items():
        if given:
            raise OptionError(f"{option} with {shared}: not possible; give size 1")
    if backend not in ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d", "fully_sharded"):
        raise OptionError(
            f"--ddp-backend {backend} with {shared}: expected legacy_ddp, pytorch_ddp or "
            "fully_sharded, or size 1"
        )


def _keeps_copies(cfg):
    """Whether the optimizer restores the weights from float32 copies after every update."""
    common = cfg.common
    return (common.fp16 and not common.memory_efficient_fp16) or (
        common.bf16 and not common.memory_efficient_bf16
    )
