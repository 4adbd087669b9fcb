"""Encoder, projector and head as one model."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jevb_jax.networks.class_token_vit import (
    ClassTokenViT,
    Pool,
    dinov2_small,
    dinov2_small_registers,
    timm_vit_small,
    timm_vit_tiny,
)
from jevb_jax.networks.frozen import FrozenFeatures
from jevb_jax.networks.heads import (
    DirectionalPredictor,
    HeadInput,
    HeadName,
    InferenceNetwork,
    Predictor,
    Projector,
    head_features,
    inverse_softplus_above,
)
from jevb_jax.networks.resnet import ConvNet, ResNet, resnet8, resnet18, resnet34, resnet50
from jevb_jax.networks.vit import ViT, vit_small, vit_tiny

_MIN_RADIAL_SCALE = 1e-3
# The networks by their names in `model.backbone`.
RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}
VITS: dict[str, Callable[..., ViT]] = {"vit_tiny": vit_tiny, "vit_small": vit_small}
# In the form of published weights.
CLASS_TOKEN_VITS: dict[str, Callable[..., ClassTokenViT]] = {
    "timm_vit_tiny": timm_vit_tiny,
    "timm_vit_small": timm_vit_small,
    "dinov2_small": dinov2_small,
    "dinov2_small_registers": dinov2_small_registers,
}
BACKBONES = (*RESNETS, "convnet", *VITS, *CLASS_TOKEN_VITS, "identity")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class ViewOutputs(NamedTuple):
    """Outputs of the model for one batch of views; all float32.

    Attributes:
      representation: `[batch, features]`, the backbone's pooled output, never normalized. It is
        used for evaluation.
      embedding: `[batch, dim]`, the projector's output. JEVB's likelihood is a density of it.
      prediction: output of the head: a `Posterior`, a vector `[batch, dim]`, a
        `DirectionalPrediction`, or None without a head.
    """

    representation: jax.Array
    embedding: jax.Array
    prediction: Any

    @property
    def posterior_mean(self) -> jax.Array:
        """Mean of a `Posterior`, `[batch, dim]`."""
        return self.prediction.posterior_mean

    @property
    def posterior_scale(self) -> jax.Array:
        """Standard deviation of a `Posterior`, `[batch, dim]`, positive."""
        return self.prediction.posterior_scale


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


class JointEmbeddingModel(nn.Module):
    """Backbone, projector and head, and the learned scale of the radial likelihood.

    `params` has the entries `backbone` (not for frozen features), `projector`, `head` where the
    method has one, and for JEVB the scalar `raw_radial_scale`.

        variables = model.init(key, images, train=False)
        outputs, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        scale = model.apply({"params": variables["params"]}, method="radial_scale")

    Attributes:
      backbone: images to representations.
      projector: representations to embeddings.
      head: embeddings to a prediction, or None.
      head_input: the part of the embedding that the head reads, by `head_features`.
      initial_radial_scale: value of `radial_scale()` at initialization, above 1e-3; None for a
        method without a radial likelihood.

    Raises:
      ValueError: `initial_radial_scale <= 1e-3`.
    """

    backbone: nn.Module
    projector: nn.Module
    head: nn.Module | None
    initial_radial_scale: float | None = 0.5
    head_input: HeadInput = "embedding"

    def __post_init__(self) -> None:
        self._initial_raw_radial_scale()
        super().__post_init__()

    def setup(self) -> None:
        """Creates the radial scale. It is done here, so that `init` always returns it."""
        raw = self._initial_raw_radial_scale()
        if raw is not None:
            initializer = nn.initializers.constant(raw)
            self.raw_radial_scale = self.param("raw_radial_scale", initializer, (), jnp.float32)

    def __call__(self, images: jax.Array, *, train: bool) -> ViewOutputs:
        """Maps images `[batch, height, width, channels]`, or features `[batch, F]`, to `ViewOutputs`.

        Args:
          images: floating point and normalized.
          train: if True, BatchNorm uses the statistics of the batch; pass `mutable=["batch_stats"]`
            to `apply`. If False, it uses the running ones, and no output depends on other images.
        """
        return self.outputs_of(self.backbone(images, train=train), train=train)

    def outputs_of(self, representation: jax.Array, *, train: bool) -> ViewOutputs:
        """Maps representations `[batch, features]` to `ViewOutputs`."""
        embedding = self.projector(representation, train=train)
        if self.head is None:
            return ViewOutputs(representation, embedding, None)
        prediction = self.head(head_features(embedding, self.head_input), train=train)
        return ViewOutputs(representation, embedding, prediction)

    def radial_scale(self) -> jax.Array:
        """Scale of the radial likelihood, a float32 scalar above 1e-3, the same for all images."""
        return nn.softplus(self.raw_radial_scale) + _MIN_RADIAL_SCALE

    def _initial_raw_radial_scale(self) -> float | None:
        if self.initial_radial_scale is None:
            return None
        return inverse_softplus_above(
            self.initial_radial_scale, _MIN_RADIAL_SCALE, name="initial_radial_scale"
        )


def make_model(
    *,
    backbone: str,
    width: int,
    stem: str,
    patch_size: int,
    projector_hidden_dims: Sequence[int],
    projector_normalizes_output: bool,
    embedding_dim: int,
    head: HeadName,
    head_input: HeadInput,
    head_hidden_dim: int,
    initial_scale: float,
    min_scale: float,
    isotropic: bool,
    has_likelihood_scale: bool,
    initial_radial_scale: float,
    dtype: str,
    zero_init_residual: bool,
    batch_norm: str,
    pool: Pool = "class",
    frozen_stages: int = 0,
    num_features: int = 0,
    standardize: bool = True,
) -> JointEmbeddingModel:
    """Builds the model from plain values. Only this function turns names into modules.

    Args:
      backbone: one of `BACKBONES`; "identity" is for features of a frozen encoder.
      width: width of the first stage (ResNet: 64; ConvNet: 32, doubled twice) or of the tokens
        (ViT: 192 or 384; one of `CLASS_TOKEN_VITS` then gets heads of width 64). 0 takes these
        defaults.
      stem: "cifar" or "imagenet"; used by ResNets only.
      patch_size: in pixels; used by ViTs only.
      projector_hidden_dims: widths of the projector's hidden layers.
      projector_normalizes_output: whether the projector ends with BatchNorm.
      embedding_dim: width of embedding and prediction.
      head: "posterior" (JEVB), "vector" (SimSiam, BYOL), "direction" (VI-SimSiam) or "none".
      head_input: as for `head_features`; used by "posterior" and "direction". A head that predicts
        a vector reads the embedding, as published.
      head_hidden_dim: width of the head's hidden layer.
      initial_scale: standard deviation of a posterior at initialization.
      min_scale: lower bound of that standard deviation.
      isotropic: one scale for all features of an image's posterior.
      has_likelihood_scale: as for `InferenceNetwork`.
      initial_radial_scale: radial scale at initialization; used with a posterior only.
      dtype: compute type, "float32" or "bfloat16".
      zero_init_residual: as for `ResidualBlock`; used by ResNets only.
      batch_norm: "fused" or "plain", as for `ResidualBlock.fused_batch_norm`; used by ResNets and
        the ConvNet only.
      pool: as for `ClassTokenViT`; used by these only.
      frozen_stages: as for `ResNet` and `ClassTokenViT`; the features of "identity" have none.
      num_features: number of columns of the features; used by "identity" only.
      standardize: whether columns are standardized; used by "identity" only.

    Raises:
      ValueError: a name is unknown, or a module does not accept a value.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if batch_norm not in ("fused", "plain"):
        raise ValueError(f'batch_norm must be "fused" or "plain", got {batch_norm!r}')
    if width < 0:
        raise ValueError(f"width must be positive, or 0 for the network's own, got {width}")
    compute_dtype = DTYPES[dtype]
    options: dict[str, Any]

    if backbone in RESNETS:
        options = {"width": width} if width else {}
        backbone_module = RESNETS[backbone](
            stem=stem,
            zero_init_residual=zero_init_residual,
            fused_batch_norm=batch_norm == "fused",
            frozen_stages=frozen_stages,
            dtype=compute_dtype,
            **options,
        )
    elif backbone in VITS:
        options = {"hidden_size": width} if width else {}
        backbone_module = VITS[backbone](
            patch_size=patch_size, frozen_stages=frozen_stages, dtype=compute_dtype, **options
        )
    elif backbone in CLASS_TOKEN_VITS:
        # No array tells the number of heads, and in all published networks a head is 64 wide.
        options = {"hidden_size": width, "num_heads": max(width // 64, 1)} if width else {}
        backbone_module = CLASS_TOKEN_VITS[backbone](
            patch_size=patch_size,
            pool=pool,
            frozen_stages=frozen_stages,
            dtype=compute_dtype,
            **options,
        )
    elif backbone == "convnet":
        options = {"widths": (width, 2 * width, 4 * width)} if width else {}
        backbone_module = ConvNet(
            fused_batch_norm=batch_norm == "fused",
            frozen_stages=frozen_stages,
            dtype=compute_dtype,
            **options,
        )
    elif backbone == "identity":
        backbone_module = FrozenFeatures(num_features=num_features, standardize=standardize)
    else:
        raise ValueError(f"backbone must be one of {list(BACKBONES)}, got {backbone!r}")

    projector = Projector(
        hidden_dims=tuple(projector_hidden_dims),
        embedding_dim=embedding_dim,
        normalize_output=projector_normalizes_output,
        dtype=compute_dtype,
    )
    head_options: dict[str, Any] = {
        "hidden_dim": head_hidden_dim,
        "dim": embedding_dim,
        "dtype": compute_dtype,
    }
    head_module: nn.Module | None
    if head == "posterior":
        head_module = InferenceNetwork(
            initial_scale=initial_scale,
            min_scale=min_scale,
            isotropic=isotropic,
            has_likelihood_scale=has_likelihood_scale,
            **head_options,
        )
    elif head == "vector":
        head_module = Predictor(**head_options)
    elif head == "direction":
        head_module = DirectionalPredictor(**head_options)
    elif head == "none":
        head_module = None
    else:
        raise ValueError(f"head must be posterior, vector, direction or none, got {head!r}")

    return JointEmbeddingModel(
        backbone=backbone_module,
        projector=projector,
        head=head_module,
        initial_radial_scale=initial_radial_scale if head == "posterior" else None,
        head_input=head_input if head in ("posterior", "direction") else "embedding",
    )
