"""Quantized weights as plain numbers again, and nothing left that says that they were quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from converter.dtypes import BY_TORCH_NAME, DType
from converter.errors import Unsupported, WconvError, name_some
from converter.libraries.base import DTYPE_KEYS
from converter.models.checkpoint import Checkpoint
from converter.models.component import QUANTIZATION_KEYS, QUANTIZER_CONFIGS, Component, nested, quantization_of
from converter.models.configs import read_json, render_json
from converter.models.schemes import holds_codes, quantized_in
from converter.plan.make import join
from converter.plan.types import Order, Plan, Rest
from converter.recipes.carry import left_behind
from converter.recipes.request import Request
from converter.recipes.steps import Job, into_one_set, make_ready, open_job, open_sets, plan_job, select
from converter.transforms.names import name_sets
from converter.transforms.quantize import find_numbers
from converter.transforms.quantize.restore import dequantized

_PARAMS = "params.json"
_PLAIN = ("fp32", "bf16", "fp16")  # the dtypes that a model runs in


def plan_dequantized(request: Request) -> Plan:
    """Plan the way back: quantized weights as numbers, in the request's dtype and all else in it too.

    Without one each comes in the dtype that its config names, or else in its scheme's, and all else as it is. In a
    pipeline only the parts that are quantized are written anew. Names are asked for by those that the numbers have.
    Raises Unsupported for weights in another form, BadFile
    for scales that do not fit. A class that is in no table is taken to have no Conv1D where its library is not
    installed.
    """
    casting = request.casting
    job = open_job(into_one_set(request, to_file=True))
    opened, notes = _open_quantized(job)
    ready = []
    for component, checkpoint in opened:
        found = find_numbers(component, checkpoint)
        dtype = casting.dtype or _said_dtype(component.config)
        ready.append((_unquantized(component), dequantized(checkpoint, found, dtype, casting.on_overflow)))
    named = name_sets(ready, request.names, job.model.path, unwraps=False)
    orders = [_with_plain_dtype(order) for order in make_ready(job, named)]
    is_file = job.model.kind == "file"
    if is_file:  # whose config is that of all weights in its folder
        configs = {component.name: component.config for component, _ in opened}
        orders = [order.with_config(configs[order.component.name]) for order in orders]
    selected = [(component, checkpoint.weight_set) for component, checkpoint in opened]
    rest = Rest(
        notes=tuple(notes), generated={} if is_file else dict(_plain_params(component for component, _ in opened))
    )
    configs_of_quantizers = {join(component.name, name) for component, _ in opened for name in QUANTIZER_CONFIGS}
    return left_behind(plan_job(job, selected, orders, rest), configs_of_quantizers, "of the quantization")


def _open_quantized(job: Job) -> tuple[list[tuple[Component, Checkpoint]], list[str]]:
    """Open the sets that hold quantized weights, or whose configs say so, and note which others could not be looked at.

    Raises Unsupported where one that is asked for, or said to be, holds none, or all others.
    """
    asked = job.request.selection.components
    said = [component.name for component in job.model.components if quantization_of(component.config)]
    first = select(job, components=asked or said)
    opened = open_sets(job, first, named=False)
    quantized = list(filter(_is_quantized, opened))
    is_meant = asked or said or len(opened) == 1
    if is_meant and len(quantized) < len(opened):
        raise _holds_none(*next(one for one in opened if not _is_quantized(one)))
    notes = []
    for component in job.model.components if said and not asked else ():
        if component.name not in said:
            try:
                others = open_sets(job, select(job, components=(component.name,)), named=False)
            except WconvError as error:
                notes.append(f"{component.name} was not looked at, and goes along as it is: {error}")
            else:
                quantized += filter(_is_quantized, others)
    if not quantized:
        raise _holds_none(*opened[0])
    return quantized, notes


def _is_quantized(opened: tuple[Component, Checkpoint]) -> bool:
    return bool(quantized_in(opened[1]))


def _said_dtype(config: Mapping[str, Any]) -> DType | None:
    """Give the dtype that a config names for its model: its own word before that on texts, and before all others."""
    texts = (config.get(key) for key in ("text_config", "llm_config"))
    configs = [config, *(one for one in texts if isinstance(one, dict)), *nested(dict(config))]
    said = (value for one in configs for key in DTYPE_KEYS if isinstance(value := one.get(key), str))
    dtypes = (BY_TORCH_NAME.get(value.removeprefix("torch.")) for value in said)
    return next((dtype for dtype in dtypes if dtype and dtype.short_name in _PLAIN), None)


def _with_plain_dtype(order: Order) -> Order:
    """Let a config that names a dtype of 8 bits or fewer name that of the weights."""
    dtypes = Counter(tensor.dtype.torch_name for tensor in order.checkpoint.tensors if tensor.source.computes)
    [(name, _)] = dtypes.most_common(1) or [("", 0)]

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(key, one) for key, one in value.items()}
        is_packed = key in DTYPE_KEYS and isinstance(value, str) and value.removeprefix("torch.").startswith("float8")
        return name if name and is_packed else value

    return order.with_config(changed("", order.component.config))


def _plain_params(components: Iterable[Component]) -> Iterator[tuple[str, bytes]]:
    """Give the configs of Mistral's own that say how weights are quantized, without that."""
    for component in components:
        params = read_json(component.path / _PARAMS)
        if "quantization" in params:
            plain = {key: value for key, value in params.items() if key != "quantization"}
            yield join(component.name, _PARAMS), render_json(plain)


def _holds_none(component: Component, checkpoint: Checkpoint) -> Unsupported:
    """Give what is said where nothing is quantized."""
    problem = "holds no quantized weights that wconv knows"
    advice = "'wconv recast' casts weights that are not quantized."
    said = quantization_of(component.config)
    lone = [one for one in checkpoint.tensors if holds_codes(one.name, one.dtype)]
    if lone and not said and all(one.dtype.is_floating for one in lone):
        problem = f"holds float8 without scales, which are plain numbers, such as {lone[0].name!r}"
        advice = "'wconv recast --dtype bf16' casts them."
    if said:
        problem += f", and its config.json says that it is quantized ({str(said.get('quant_method'))[:60]})"
        advice = "Load it with the library that this names; or take that out, if its weights are plain numbers."
        if lone:
            problem += f": there is no scale for {name_some([one.name for one in lone], 3)}"
            advice = "Fetch all files of the model again."
    return Unsupported(checkpoint.weight_set.path, problem, advice)


def _unquantized(component: Component) -> Component:
    """Give a component whose config, and those in it, say nothing of a quantization."""

    def plain(config: dict[str, Any]) -> dict[str, Any]:
        kept = ((key, value) for key, value in config.items() if key not in QUANTIZATION_KEYS)
        return {key: plain(value) if isinstance(value, dict) else value for key, value in kept}

    return replace(component, config=plain(component.config))
