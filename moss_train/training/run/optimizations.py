"""Apply compilation and activation checkpointing to a module from outside; the names of weights do not change."""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from moss_train.config.fit_schema import FitConfig
from moss_train.discriminators import ComplexSTFTDiscriminator, Discriminator
from moss_train.model import MossAudioTokenizerModel
from moss_train.model.transformer import TransformerLayer
from moss_train.training.module import CatModule, stages_of
from moss_train.training.run.trainer import REDUCE_DTYPES, choose_accelerator, choose_precision
from moss_train.training.step.optimizers import EMA
from moss_train.utils.errors import UserError
from moss_train.utils.files import warn

RECOMPILE_LIMIT = 64
"""Versions of one code object that torch may compile; the first update of `cat_1b6` uses up its default of 8."""


def apply_optimizations(module: CatModule, config: FitConfig) -> None:
    """Apply the `ema` and the `trainer` options of a run to its module."""
    settings = config.trainer
    module.shares_every_updates = config.logging.log_gradient_shares_every
    module.reduce_dtype = REDUCE_DTYPES[settings.reduce_dtype]
    accelerator = choose_accelerator(settings.accelerator)
    is_half = choose_precision(settings.precision, accelerator) == "bf16-mixed"
    module.gather_dtype = torch.bfloat16 if is_half else None
    if config.ema is not None:
        module.average = EMA(config.ema.decay)
    checkpoint_activations(module.tokenizer, settings.activation_checkpointing)
    backend = choose_compile(settings.compile, accelerator)
    if backend is not None:
        compile_blocks(module, backend)


def checkpoint_activations(model: MossAudioTokenizerModel, frame_rates: Sequence[float]) -> None:
    """Enable activation checkpointing in the stages with these frame rates (Hz): blocks keep only their inputs.

    The stages with high rates hold most activations. Recomputing them costs one more forward pass of those stages.

    Raises:
        UserError: no stage has one of these rates.
    """
    rates = {stage: model.config.frame_rate * stage.frames_per_code_frame for stage in stages_of(model)}
    if unknown := set(frame_rates) - set(rates.values()):
        raise UserError(
            f"trainer.activation_checkpointing: no stage runs at {sorted(unknown)} Hz, there are "
            f"{sorted(set(rates.values()))}"
        )
    for stage, rate in rates.items():
        stage.transformer.gradient_checkpointing = rate in frame_rates


def compile_part(part: nn.Module, backend: Callable[..., Any]) -> None:
    """Compile a part's training passes with dynamic shapes; its names and its other passes do not change.

    Streaming and validation run eagerly: a pass without gradients, or over a chunk of a stream, would need graphs of
    its own. The part's own hooks, including those of FSDP, stay outside the graph. Where FSDP gathers linear layers in
    bfloat16, their hooks split it into several.
    """
    eager = part.forward
    always = isinstance(part, Discriminator)  # also without gradients, for updates that do not train discriminators
    compiled = torch.compile(eager, backend=backend, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (always or torch.is_grad_enabled()) or not part.training:
            return eager(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:
            # The warning comes once; from now on torch runs passes without a graph eagerly and does not try again.
            set_in_all_threads(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
            warn(
                f"trainer.compile: {type(part).__name__} runs partly without compiled graphs from now on, right but "
                f"slow: torch has made {torch._dynamo.config.recompile_limit} versions of it. TORCH_LOGS=recompiles "
                "says why"
            )
            return eager(*args, **kwargs)

    part.forward = forward


def compile_blocks(module: CatModule, backend: str = "inductor") -> None:
    """Compile every transformer block and discriminator on its own: equal blocks share one graph, and names stay.

    The whole step would neither compile in reasonable time nor as one graph. Shapes are symbolic from the first call,
    because the sizes of clips and batches change all the time. All blocks share one code object, so torch has to keep
    many versions of it: for each stage, for clips within and beyond the attention window, for a batch of one.

    Raises:
        UserError: torch has no such backend.
    """
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=None)):
        raise UserError(f"trainer.compile={backend}: torch has the backends {', '.join(known)}")
    options = torch._dynamo.config
    # The discriminators' graph serves two backward passes; a compiler that reuses its buffers allows only one.
    set_in_all_threads(torch._functorch.config, "donated_buffer", False)
    set_in_all_threads(options, "fail_on_recompile_limit_hit", True)  # raises an error, which `compile_part` catches
    set_in_all_threads(options, "recompile_limit", max(RECOMPILE_LIMIT, options.recompile_limit))
    set_in_all_threads(options, "accumulated_recompile_limit", max(1024, options.accumulated_recompile_limit))
    for part in compiled_parts(module):
        # Loops over blocks of queries, and complex spectra, stay out of the graphs: each length would need its own.
        if isinstance(part, TransformerLayer):
            part.self_attn.blockwise_attention = torch.compiler.disable(part.self_attn.blockwise_attention)
        elif isinstance(part, ComplexSTFTDiscriminator):
            part.planes = torch.compiler.disable(part.planes)  # type: ignore[method-assign]
        compile_part(part, torch._dynamo.lookup_backend(backend))


def set_in_all_threads(options: Any, name: str, value: object) -> None:
    """Set an option of torch for this thread and as the default of all others.

    An assignment alone holds for its own thread, but on a GPU backward passes run in threads of autograd.
    """
    setattr(options, name, value)
    options._config[name].default = value


def compiled_parts(module: CatModule) -> list[nn.Module]:
    """Return the transformer blocks of the tokenizer and of the text LM, and the sub-discriminators."""
    blocks = [layer for stage in stages_of(module.tokenizer) for layer in stage.transformer.layers]
    if module.semantic is not None:
        blocks += list(getattr(module.semantic.language_model.model, "layers", []))
    if module.discriminators is not None:
        blocks += list(module.discriminators.discriminators)
    return blocks


def choose_compile(wanted: bool | str, accelerator: str) -> str | None:
    """Return the backend for `trainer.compile`, None for no compilation; `auto` is inductor on CUDA if it can build its
    kernels.
    """
    if isinstance(wanted, bool):
        return "inductor" if wanted else None
    if wanted != "auto":
        return wanted
    if accelerator != "cuda":
        return None
    if missing := missing_for_kernels():
        warn(f"trainer.compile=auto: torch.compile needs {missing}, which is not here; the run goes without, slower")
        return None
    return "inductor"


def missing_for_kernels() -> str | None:
    """Return what triton, which compiles a small C extension of Python, does not find on this machine."""
    if importlib.util.find_spec("triton") is None:
        return "triton"
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        return "a C compiler (Debian, Ubuntu: apt install gcc)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as triton does, for Debian
    if not Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        return "Python.h (Debian, Ubuntu: apt install python3-dev)"
    return None
