"""How to run the authors' own code beside ours: where in their repositories it is, and what it takes.

Nothing of theirs is in this repository. It is read from checkouts that the user has, found by function names and by
the beginnings of lines, and run as it is but for what the table's remarks say. Newer or older versions than the
commits named here may not be found, or may do something else.
"""

from __future__ import annotations

import ast
import importlib
import math
import sys
import textwrap
import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from spatiotoken.structures import VideoFeatures
from spatiotoken.token_benchmark import FRAMEFUSION, STTM, Subject, view_for
from spatiotoken.tokens import TokenReducer
from spatiotoken.tokens.aot import aot_anchors, aot_counts

_COMMON = {"torch": torch, "F": F, "nn": torch.nn, "math": math, "print": lambda *args, **kwargs: None}


@dataclass(frozen=True)
class Checkout:
    """A folder with one repository of the authors, and ways to load a part of it."""

    root: Path

    def module(self, file: str, package: str = "") -> Any:
        """The module, loaded by path; it may import its siblings, but its package's ``__init__`` is not run.

        Args:
            package: name by which it imports its siblings, if not relatively.
        """
        path = self._existing(file)
        # Siblings are reached through a stand-in for the package, since real ones import whole models.
        package = package or f"authors_{abs(hash(path.parent))}"
        stand_in = types.ModuleType(package)
        stand_in.__path__ = [str(path.parent)]
        sys.modules[package] = stand_in
        return importlib.import_module(f"{package}.{path.stem}")

    def functions(self, file: str, /, *names: str, without: str = "", **namespace: Any) -> types.SimpleNamespace:
        """Functions, methods or classes of a file that cannot be imported whole, which see only each other.

        Args:
            without: leave out a function's own statements that set this variable, and loops over its parts.
            namespace: what else they see.
        """
        text = self._existing(file).read_text()
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            # AOT's file lacks a colon, elsewhere.
            if error.msg != "expected ':'" or error.lineno is None:
                raise
            lines = text.splitlines()
            lines[error.lineno - 1] += ":"
            tree = ast.parse("\n".join(lines))
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = {node.name: node for node in ast.walk(tree) if isinstance(node, kinds) and node.name in names}
        if missing := [name for name in names if name not in found]:
            raise LookupError(f"no {', '.join(missing)} in {file}")
        for node in found.values():
            node.decorator_list = []
            _leave_out(node, without)
        return _run(ast.Module([found[name] for name in names], []), namespace)

    def lines(
        self, file: str, first: str, last: str, inputs: str, result: str, /, without: str = "", **namespace: Any
    ) -> Callable[..., Any]:
        """A function made of the lines from the one that begins with ``first`` to the next that begins with ``last``.

        Args:
            inputs: names that the lines take, with commas.
            result: the expression to return after them.
            without, namespace: as for ``functions``.
        """
        lines = self._existing(file).read_text().splitlines()
        start = next((i for i, line in enumerate(lines) if line.strip().startswith(first)), None)
        rest = range(len(lines) if start is None else start, len(lines))
        end = next((i for i in rest if lines[i].strip().startswith(last)), None)
        if start is None or end is None:
            raise LookupError(f"no lines from {first!r} to {last!r} in {file}")
        body = textwrap.dedent("\n".join(lines[start : end + 1]))
        source = f"def slice({inputs}):\n{textwrap.indent(body, '    ')}\n    return {result}\n"
        tree = ast.parse(source)
        _leave_out(tree.body[0], without)
        return _run(tree, namespace).slice

    def _existing(self, file: str) -> Path:
        path = self.root / file
        if not path.is_file():
            raise LookupError(f"no file {file}")
        return path


@dataclass(frozen=True)
class Original:
    """The authors' code for one method.

    Attributes:
        repo, commit: where it is public, and the version that this was written for.
        load: makes it ready to be timed with the settings of our method.
        remark: what to know of its time.
    """

    repo: str
    commit: str
    load: Callable[[Checkout, Any], Subject]
    remark: str = ""


def load_originals(
    folder: Path, methods: Mapping[str, TokenReducer | None]
) -> tuple[dict[str, Subject | str], dict[str, str]]:
    """The authors' code for each method that has some in ``folder``, else why not; and remarks on their times.

    Args:
        folder: a repository ``owner/name`` is looked for as ``owner+name`` and as ``name`` in it.
        methods: ours as they are set; None for those that have no settings.
    """
    subjects: dict[str, Subject | str] = {}
    remarks: dict[str, str] = {}
    for name, reducer in methods.items():
        original = ORIGINALS.get(name)
        if isinstance(original, str) or original is None:
            subjects[name] = original or "no code of the authors known here"
            continue
        names = (original.repo.replace("/", "+"), original.repo.partition("/")[2])
        root = next((folder / part for part in names if (folder / part).is_dir()), None)
        if root is None:
            subjects[name] = f"no checkout of {original.repo}"
            continue
        try:
            subjects[name] = original.load(Checkout(root), reducer)
        except (ImportError, LookupError, SyntaxError) as error:
            subjects[name] = f"{original.repo} (written for {original.commit}): {error}"
        else:
            remarks[name] = original.remark
    return subjects, remarks


def _run(tree: ast.Module, namespace: dict[str, Any]) -> types.SimpleNamespace:
    scope = _COMMON | namespace
    # Annotations may name types that nobody imported here.
    code = compile(ast.fix_missing_locations(tree), "<authors>", "exec", annotations.compiler_flag)
    exec(code, scope)
    return types.SimpleNamespace(**scope)


def _leave_out(function: Any, variable: str) -> None:
    if variable:
        function.body = [part for part in function.body if variable not in _set_by(part)]


def _set_by(statement: ast.stmt) -> set[str]:
    """Variables that a statement, or a loop's statements, assigns to."""
    stores: set[str] = set()
    for node in ast.walk(statement):
        for target in node.targets if isinstance(node, ast.Assign) else []:
            while isinstance(target, ast.Subscript | ast.Attribute):
                target = target.value
            stores |= {target.id} if isinstance(target, ast.Name) else set()
    return stores


def _frames(video: VideoFeatures) -> tuple[Tensor]:
    return (video.frames,)


def _ranked(reducer: TokenReducer) -> Callable[[VideoFeatures], tuple[Tensor, Tensor]]:
    """``[T, N, D]`` tokens and the ``[T, N]`` saliency that our method ranks by (the mean of its layers)."""

    def inputs(video: VideoFeatures) -> tuple[Tensor, Tensor]:
        view = view_for(reducer, video)
        saliency = view.needed("saliency").mean(dim=0).view(video.grid[0], -1)
        return view.frames, saliency

    return inputs


def _aim(checkout: Checkout, reducer: Any) -> Subject:
    merge = checkout.module("llava/model/token_merge.py").bipartite_soft_matching_merge

    def run(frames: Tensor) -> Tensor:
        half = merge(frames, frames.shape[1] // 2, frames)
        return merge(half, frames.shape[1] // 4, half).flatten(0, 1)

    return Subject(run, _frames)


def _aot(checkout: Checkout, reducer: Any) -> Subject:
    file = "LLaVA-NeXT/llava/model/llava_arch.py"
    names = ("Sinkhorn_v1", "token_merging_siglip_with_OTA", "ota_merge_N_to_M_time", "temporal_ota_merge")
    self = types.SimpleNamespace()
    code = checkout.functions(file, *names, self=self)
    for name in names[:-1]:
        setattr(self, name, types.MethodType(getattr(code, name), self))

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        # Their choice of anchors knows only 27 x 27 grids.
        frames, (places, height, width) = video.grid[0], (video.tokens_per_frame, *video.grid[1:])
        length, count, _ = aot_counts(video.grid, reducer.retention, reducer.keep, reducer.clips)
        early, late = view_for(reducer, video).needed("saliency").view(2, frames, places)
        anchors = aot_anchors(early, late, (height, width), count, reducer.local, reducer.windows)
        mask = torch.zeros(frames, places, dtype=torch.bool, device=anchors.device).scatter_(1, anchors, True)
        segments = [(start, min(length, frames - start)) for start in range(0, frames, length)]
        return video.frames, mask, segments

    def run(frames: Tensor, mask: Tensor, segments: list[tuple[int, int]]) -> Tensor:
        merged = self.token_merging_siglip_with_OTA(frames, mask)
        return code.temporal_ota_merge(merged, lambda frame: mask[frame], segments, reducer.keep, 1.0)

    return Subject(run, inputs)


def _cdpruner(checkout: Checkout, reducer: Any) -> Subject:
    block = checkout.lines(
        "llava/model/llava_arch.py",
        "B, N, C =",
        "index_masks.scatter_(",
        "self, image_features, image_embeds, text_embeds",
        "image_features[index_masks]",
        without="image_features",
    )

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        self = types.SimpleNamespace(visual_token_num=round(video.tokens_per_frame * reducer.retention))
        # Theirs turns the relevance round.
        return self, video.frames, video.frames, -video.needed("question").mean(dim=0, keepdim=True)

    return Subject(block, inputs)


def _divprune(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.functions("LLaVA/llava/model/llava_arch.py", "DivPrune", "pairwise_cosine_similarity")
    self = types.SimpleNamespace(
        pairwise_cosine_similarity=lambda matrix: code.pairwise_cosine_similarity(None, matrix)
    )

    def run(tokens: Tensor) -> Tensor:
        picked, _ = code.DivPrune(self, tokens, tokens.shape[0], threshold_ratio=reducer.retention)
        return tokens[picked.sort().values]

    return Subject(run, lambda video: (video.embeddings,))


def _dtd(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.functions("eval/qwen2_5_vl/modeling_qwen2_5_vl_DTD.py", "token_drop", without="pixel_values_videos")
    relative = reducer.retention is not None
    threshold = 1 - reducer.retention if relative else reducer.threshold
    start, end = 1, 2
    self = types.SimpleNamespace(config=types.SimpleNamespace(vision_start_token_id=start, vision_end_token_id=end))

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        frames, height, width = video.grid
        ids = torch.zeros(video.num_tokens + 2, dtype=torch.int64)
        ids[0], ids[-1] = start, end
        grid = torch.meshgrid(*(torch.arange(1, size + 1) for size in video.grid), indexing="ij")
        positions = torch.stack([part.flatten() for part in grid])
        # The text before and after has times of its own.
        positions = F.pad(positions, (1, 0))
        positions = F.pad(positions, (0, 1), value=frames + 1)[:, None]
        hidden = F.pad(video.embeddings, (0, 0, 1, 1))[None]
        rotary = torch.zeros(3, 1, video.num_tokens + 2, 1)
        size = torch.tensor([[frames, 2 * height, 2 * width]])
        return hidden, size, (rotary, rotary), positions, ids[None, None]

    def run(hidden: Tensor, size: Tensor, rotary: tuple[Tensor, Tensor], positions: Tensor, ids: Tensor) -> Tensor:
        settings = ("feature", threshold, not relative)
        return code.token_drop(self, *settings, hidden, None, size, rotary, positions, ids)[0][0, 1:-1]

    return Subject(run, inputs)


def _dycoke(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.functions("llava/model/llava_arch.py", "dycole_ttm")
    return Subject(
        lambda video: code.dycole_ttm(video.embeddings, video.tokens_per_frame, merging_ratio=reducer.merging_ratio)
    )


def _evs(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.module("vllm/multimodal/evs.py")

    def run(video: VideoFeatures) -> Tensor:
        tokens = video.embeddings
        return tokens[code.compute_retention_mask(tokens, video.grid, 1, 1 - reducer.retention)]

    return Subject(run)


def _fastvid(checkout: Checkout, reducer: Any) -> Subject:
    file = "fastvid_llavaonevision/LLaVA-NeXT/llava/model/language_model/modeling_qwen2.py"
    block = checkout.lines(
        file,
        "if seq_length > 1:",
        "position_embeddings = (",
        "self, hidden_states, seq_length, position_embeddings, causal_mask",
        "hidden_states[0]",
    )
    ranked = _ranked(reducer)

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        frames, saliency = ranked(video)
        self = types.SimpleNamespace(
            video_start_idx=0,
            video_token_len=video.num_tokens,
            frame_num=video.grid[0],
            frame_attn_weights=saliency,
            frame_global_features=video.frame_features,
            fastvid_DySeg_c=reducer.segments,
            fastvid_DySeg_tau=reducer.segment_threshold,
            fastvid_retention_ratio=reducer.retention,
            fastvid_STPrune_d=reducer.contextual,
            fastvid_DTM_p=reducer.stride,
            fastvid_DTM_beta=reducer.anchor_weight,
        )
        rotary = torch.zeros(1, video.num_tokens, 1)
        return self, frames.flatten(0, 1)[None], video.num_tokens, (rotary, rotary), None

    return Subject(block, inputs)


def _flashvid(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.module("flashvid/utils.py")
    ranked = _ranked(reducer)

    def run(frames: Tensor, saliency: Tensor) -> Tensor:
        settings = code.FlashVidConfig(
            retention_ratio=reducer.retention,
            expansion=1.0,
            alpha=reducer.selected,
            token_selection_method=reducer.selection,
            temporal_threshold=reducer.temporal_threshold,
            segment_threshold=reducer.segment_threshold,
            min_segment_num=reducer.segments,
        )
        return code.flashvid_compression(frames, saliency, settings)[0]

    return Subject(run, ranked)


def _framefusion(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.module("framefusion/main.py")

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        fusion = code.FrameFusion(*FRAMEFUSION.values())
        count, places = video.num_tokens, video.tokens_per_frame
        place = torch.arange(places).repeat(video.grid[0])[None]
        fusion.prepare(place, places, torch.tensor(0), torch.tensor(count), torch.tensor(count), count)
        rotary = torch.zeros(1, count, 1)
        return fusion, video.embeddings[None], [rotary, rotary.clone()]

    return Subject(lambda fusion, hidden, rotary: fusion(hidden, rotary, None)[0][0], inputs)


def _globalcom2(checkout: Checkout, reducer: Any) -> Subject:
    file = "llava/model/llava_arch.py"
    names = (
        "generate_scale_for_crop_features",
        "interpolate_and_split_cls_attn_scores",
        "select_topk_crop_features",
    )
    code = checkout.functions(file, *names, np=numpy, retention_ratio=reducer.retention)

    def run(frames: Tensor, saliency: Tensor) -> Tensor:
        side, tiles = math.isqrt(frames.shape[1]), frames.shape[0] - 1
        first = saliency[0].topk(int(frames.shape[1] * reducer.retention)).indices
        scales = code.generate_scale_for_crop_features(saliency[0], 1, tiles, reducer.retention, reducer.temperature)
        guide = code.interpolate_and_split_cls_attn_scores(
            saliency[0], side, tiles * side, 1, tiles, [(side, side)] * tiles
        )
        crops, _ = code.select_topk_crop_features(frames[1:], saliency[1:], guide, scales)
        return torch.cat([frames[0][first], *crops])

    return Subject(run, _ranked(reducer))


def _hired(checkout: Checkout, reducer: Any) -> Subject:
    file = "transformers/src/transformers/models/llava_next/modeling_llava_next.py"
    tiles = 7  # in one column, into which their code cuts the 196 tokens of the whole view
    code = checkout.functions(
        file,
        "HiRED_token_selection",
        "HiRED_sub_img_budgets",
        get_anyres_image_grid_shape=lambda *args: (1, tiles),
    )
    config = types.SimpleNamespace(image_grid_pinpoints=None, vision_config=types.SimpleNamespace(image_size=None))
    self = types.SimpleNamespace(config=config)
    self.HiRED_sub_img_budgets = types.MethodType(code.HiRED_sub_img_budgets, self)

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        early, late = view_for(reducer, video).needed("saliency").view(2, video.grid[0], 1, 1, -1)
        return video.frames, early, late

    def run(frames: Tensor, early: Tensor, late: Tensor) -> Tensor:
        pictures = frames.shape[0] // (1 + tiles)
        settings = (0, frames.shape[1], reducer.retention, reducer.alpha, [None] * pictures)
        masks = code.HiRED_token_selection(self, early, late, [1 + tiles] * pictures, *settings)
        return frames[torch.cat(masks)]

    return Subject(run, inputs)


def _holitom(checkout: Checkout, reducer: Any) -> Subject:
    file = "holitom/llava_arch.py"
    code = checkout.functions(file, "LlavaMetaForCausalLM_holitom", ABC=object, rank0_print=_COMMON["print"])
    driver = checkout.lines(
        file,
        "batch_size, seq_len, embed_dim = pooled",
        "image_features.append(torch.cat(",
        "self, pooled_image_feat, attn_weights, retain_ratio, tau, max_window_size, Beta, K, "
        "D=0, images_dtype=torch.float32, mm_newline_position='one_token', image_features=()",
        "image_features[0]",
        rank0_print=_COMMON["print"],
    )
    self = code.LlavaMetaForCausalLM_holitom()
    self.model = types.SimpleNamespace(image_newline=torch.zeros(1))
    ranked = _ranked(reducer)

    def run(frames: Tensor, saliency: Tensor) -> Tensor:
        settings = (reducer.retention, reducer.similarity, reducer.max_window, reducer.beta, reducer.neighbours)
        return driver(self, frames, saliency, *settings, images_dtype=frames.dtype, image_features=[])

    return Subject(run, ranked)


def _ktv_tokens(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.functions("ktv/llava/model/llava_arch.py", "encode_images")

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        frames, saliency = _ranked(reducer)(video)
        hidden = video.needed("hidden").view(*frames.shape[:2], -1)
        features = F.pad(hidden, (0, 0, 1, 0))  # the CLS token
        model = types.SimpleNamespace(
            get_vision_tower=lambda: lambda images, mode: (features, saliency), mm_projector=lambda tokens: tokens
        )
        return types.SimpleNamespace(get_model=lambda: model), video

    def run(self: Any, video: VideoFeatures) -> Tensor:
        count = int(video.num_tokens * reducer.retention)
        return code.encode_images(
            self, None, None, video.grid[0], prune_mode="uniform_token", rate=reducer.rate, tokens_num=count
        )[0]

    return Subject(run, inputs)


def _llava_scissor(checkout: Checkout, reducer: Any) -> Subject:
    file = "llava/model/llava_arch_zip.py"
    # The one call of einops splits tokens by frame.
    einops = types.SimpleNamespace(rearrange=lambda x, pattern, n, hw: x.unflatten(0, (n, hw)))
    names = {"np": numpy, "defaultdict": defaultdict, "einops": einops}
    code = checkout.functions(file, "UnionFind", "approximate_components", **names)
    block = checkout.lines(
        file,
        "frame_num = image_feat",
        "image_feat = selected_tokens",
        "self, image_feat, ori_token_num, tau, epsilon",
        "image_feat",
        approximate_components=code.approximate_components,
        **names,
    )

    def run(video: VideoFeatures) -> Tensor:
        numpy.random.seed(0)  # they visit nodes in a random order
        self = types.SimpleNamespace(total_token_1=0, total_token_2=0, val_cnt=0)
        return block(self, video.embeddings, video.tokens_per_frame, reducer.threshold, 0.05)

    return Subject(run)


def _prunevid(checkout: Checkout, reducer: Any) -> Subject:
    helpers = ("index_points", "cluster_dpc_knn", "segment_lengths", "refine_clusters")
    methods = ("compute_cluster_vectors", "spatial_merge_tokens", "merge_frames_dynamic")
    code = checkout.functions("models/pllava/modeling_pllava.py", *helpers, *methods, einsum=torch.einsum)

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        self = types.SimpleNamespace(
            config=types.SimpleNamespace(
                num_frames=video.grid[0],
                pooling_shape=video.grid,
                temporal_segment_ratio=reducer.segment_ratio,
                cluster_ratio=reducer.cluster_ratio,
            )
        )
        for name in methods[:2]:
            setattr(self, name, types.MethodType(getattr(code, name), self))
        return self, video.embeddings[None]

    def run(self: Any, tokens: Tensor) -> Tensor:
        return code.merge_frames_dynamic(self, tokens, threshold=reducer.similarity, k=reducer.neighbours)[0][0]

    return Subject(run, inputs)


def _sttm(checkout: Checkout, reducer: Any) -> Subject:
    code = checkout.module("token_merging_utils/quadtree_builder.py", package="token_merging_utils")
    return Subject(
        lambda grid: code.quadtree_build_video(grid, *STTM, root_level=1)[0],
        lambda video: (video.frames.unflatten(1, video.grid[1:]).permute(0, 3, 1, 2),),
    )


def _vidcom2(checkout: Checkout, reducer: Any) -> Subject:
    compress = checkout.module("token_compressor/vidcom2/vidcom2.py").vidcom2_compression
    return Subject(lambda video: compress(video.embeddings, "qwen2_vl", reducer.retention, video.tokens_per_frame))


def _visionzip(checkout: Checkout, reducer: Any) -> Subject:
    block = checkout.lines(
        "visionzip/clip_encoder.py",
        "cls_idx = 0",
        "hidden_states_save",
        "hidden_states, attn_weights, metric, dominant_num, contextual_num, images",
        "hidden_states_save[:, 1:].flatten(0, 1)",
    )
    ranked = _ranked(reducer)

    def with_cls(values: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        frames, saliency = ranked(video)
        keys = video.needed("keys").view(*frames.shape[:2], -1)
        kept = round(frames.shape[1] * reducer.retention)
        contextual = round(kept * reducer.contextual)
        attention = with_cls(saliency[..., None])[..., 0][:, None, None]
        return with_cls(frames), attention, with_cls(keys), kept - contextual, contextual, frames

    return Subject(block, inputs)


def _vtc_cls(checkout: Checkout, reducer: Any) -> Subject:
    block = checkout.lines(
        "llava/model/llava_arch.py",
        "_, idx = torch.topk(",
        "image_features = image_features[:, sorted",
        "cls_attn, image_features, token_num",
        "image_features[0]",
    )

    def inputs(video: VideoFeatures) -> tuple[Any, ...]:
        saliency = view_for(reducer, video).needed("saliency")
        return video.frames, saliency.view(saliency.shape[0], video.grid[0], -1)

    def run(frames: Tensor, saliency: Tensor) -> Tensor:
        count = round(frames.shape[1] * reducer.retention)
        importance = saliency.sum(dim=0)  # one line of theirs, in another file
        return torch.cat([block(importance[t], frames[t : t + 1], count) for t in range(frames.shape[0])])

    return Subject(run, inputs)


ORIGINALS: dict[str, Original | str] = {
    "aim": Original("LaVi-Lab/AIM", "edc24e9f", _aim),
    "aot": Original("TyroneLi/AOT", "88455ee3", _aot, "their anchors given; emits some twice"),
    "cdpruner": Original("Theia-4869/CDPruner", "9541616c", _cdpruner),
    "divprune": Original("vbdi/divprune", "799e2d95", _divprune),
    "downsample": "a baseline of ours",
    "dtd": Original("yaolinli/TimeChat-Online", "25a15783", _dtd, "without their pixels' preparation"),
    "dycoke": Original("KD-TAO/DyCoke", "dd746349", _dycoke, "theirs leaves one third frame whole"),
    "evs": Original("vllm-project/vllm", "094f1178", _evs),
    "fastvid": Original("LunarShen/FastVID", "a40a109c", _fastvid, "theirs loses anchors to rounding"),
    "flashvid": Original("Fanziyang-v/FlashVID", "1d37422c", _flashvid),
    "framefusion": Original("thu-nics/FrameFusion", "fbec1d2e", _framefusion),
    "globalcom2": Original("xuyang-liu16/GlobalCom2", "96b2d00b", _globalcom2, "theirs sees a picture of 31 tiles"),
    "hired": Original("hasanar1f/HiRED", "502d6dd7", _hired, "theirs sees pictures of 7 tiles each"),
    "holitom": Original("cokeshao/HoliTom", "e9b2972f", _holitom),
    "ktv_tokens": Original("hktk07/KTV", "d77f844a", _ktv_tokens),
    "llava_scissor": Original("HumanMLLM/LLaVA-Scissor", "b63354c8", _llava_scissor),
    "prunevid": Original("Visual-AI/PruneVid", "b12600c6", _prunevid),
    "random": "a baseline of ours",
    "sttm": Original("HYUNJS/STTM", "00736c79", _sttm),
    "vidcom2": Original("xuyang-liu16/VidCom2", "944a17d1", _vidcom2),
    "visionzip": Original("dvlab-research/VisionZip", "3151f6df", _visionzip),
    "vtc_cls": Original("THU-MIG/VTC-CLS", "e41ac9b4", _vtc_cls, "theirs one frame at a time"),
}
