"""What the sums of an estimate follow from, read off a model and a recipe."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.carried import stream_channels
from snp_llm.models.depth import recipe_anatomy
from snp_llm.models.site import Site
from snp_llm.models.size import ModelSize, model_size
from snp_llm.models.text_part import text_config
from snp_llm.pruning.curves import HELD_OUT_OF
from snp_llm.pruning.measured import all_cuts, windows_needed
from snp_llm.pruning.refine import refined_windows
from snp_llm.pruning.sensitivity import visit_windows
from snp_llm.pruning.statistics import enough_windows
from snp_llm.recipe.recipe import ResolvedRecipe
from snp_llm.runtime.device import device_name


@dataclass(frozen=True)
class Shapes:
    """Everything that the sums need.

    Attributes:
        anatomy: of the dense model, or of its skeleton.
        recipe: all settings.
        size: of the model.
        block_bytes, blocks_bytes: of the largest block, and of all.
        rest_bytes: of embeddings, norms and head.
        referred, visited, gone_back: windows with a reference, windows that curves are read from, and gradients; each 0
            where there is no such thing.
        refined, measured: windows that blocks are refined on, and that cuts are measured on, likewise.
        cuts: sites and widths of those.
    """

    anatomy: Anatomy
    recipe: ResolvedRecipe
    size: ModelSize
    block_bytes: int
    blocks_bytes: int
    rest_bytes: int
    referred: int
    visited: int
    gone_back: int
    refined: int
    measured: int
    cuts: list[tuple[Site, int]]

    @property
    def hidden(self) -> int:
        """d, channels that a site puts out."""
        return int(text_config(self.anatomy.model.config).hidden_size)

    @property
    def device(self) -> str:
        """The kind of device that computes."""
        return device_name(self.recipe.device)

    @property
    def device_place(self) -> str:
        """The place whose memory the device's is: the host's, where that is the CPU."""
        return "host" if self.device == "cpu" else "device"

    @property
    def waiting_place(self) -> str:
        """The place where hidden states are between blocks."""
        return {"disk": "disk", "cpu": "host"}.get(self.recipe.hidden_device, self.device_place)

    @property
    def inside(self) -> list[Site]:
        """The sites that are cut one by one, not the blocks that go as a whole: those are visited alone."""
        return [site for site in self.anatomy.sites if not site.whole_block]

    @property
    def widest(self) -> list[Site]:
        """The widest site of every kind, in the order of a block."""
        kinds = dict.fromkeys(site.kind for site in self.anatomy.sites)
        return [max((s for s in self.anatomy.sites if s.kind == kind), key=lambda s: s.channels) for kind in kinds]

    def waiting(self, windows: int, channels: int | None = None) -> int:
        """Bytes that these take where they wait: what is pinned is rounded up to a power of two."""
        size = self.states(windows, channels)
        return 1 << (size - 1).bit_length() if size and self.device == "cuda" and self.waiting_place == "host" else size

    def states(self, windows: int, channels: int | None = None) -> int:
        """Bytes of so many windows of the stream between blocks, or of so many channels."""
        channels = channels or stream_channels(self.anatomy.blocks, self.hidden)
        return windows * self.recipe.seq_len * channels * self.anatomy.model.dtype.itemsize


def read_shapes(model: PreTrainedModel, recipe: ResolvedRecipe) -> Shapes:
    """The shapes of a prune; weights are not looked at."""
    anatomy = recipe_anatomy(model, recipe)
    size = model_size(model, recipe.seq_len, recipe.experts)
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in anatomy.blocks]
    channels = max(site.load for site in anatomy.sites)
    referred = enough_windows(channels, recipe.seq_len) if recipe.reference != "self" else 0
    gone_back, visited = visit_windows(channels, int(text_config(model.config).hidden_size), recipe.seq_len, recipe)
    refined = refined_windows(recipe, recipe.num_samples, recipe.seq_len)
    cuts = all_cuts(anatomy, recipe)
    held = max(1, min(visited, recipe.num_samples) // HELD_OUT_OF)
    measured = min(windows_needed(recipe.seq_len), held) if cuts else 0
    return Shapes(
        anatomy,
        recipe,
        size,
        block_bytes=max(blocks),
        blocks_bytes=sum(blocks),
        rest_bytes=size.bytes - sum(blocks),
        referred=min(referred, recipe.num_samples),
        visited=min(visited, recipe.num_samples),
        gone_back=min(gone_back, recipe.num_samples),
        refined=min(refined, recipe.num_samples),
        measured=measured,
        cuts=cuts,
    )
