"""Features of every image of a source by a frozen encoder, each computed once."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jevb_jax import arguments, parallel
from jevb_jax.evaluation.csi import RotatedViews
from jevb_jax.images.batches import evaluation_batches
from jevb_jax.images.source import ImageSource
from jevb_jax.images.views import (
    View,
    check_source,
    plain_views,
    random_views,
    with_all_channels,
)
from jevb_jax.networks.joint import JointEmbeddingModel, ViewOutputs
from jevb_jax.paper.scores import UncertaintyTerms
from jevb_jax.xla_options import network_options

_ALWAYS_WHOLE = 4096  # a batch size up to this is never reduced, even if images are few


def useful_batch_size(batch_size: int, num_images: int) -> int:
    """The requested batch size, or a smaller one if most of the batch would be padding."""
    return min(batch_size, max(_ALWAYS_WHOLE, 1 << (num_images - 1).bit_length()))


class Features(NamedTuple):
    """Outputs for `N` un-augmented images, float32.

    Attributes:
      representation: `[N, F]`, output of the backbone.
      embedding: `[N, D]`, output of the projector.
      prediction: output of the head; see `ViewOutputs`.
      terms: JEVB's terms, or None if they were not asked for.
      labels: `[N]` int64, or None.
      rotations: `[N, 4, D]`, embeddings of `RotatedViews`, or None if they were not asked for.
    """

    representation: Any
    embedding: Any
    prediction: Any
    terms: UncertaintyTerms | None
    labels: np.ndarray | None
    rotations: Any = None


@dataclasses.dataclass(frozen=True)
class TermsSettings:
    """How JEVB's terms of an image are computed.

    Attributes:
      terms_of: `(variables, key, outputs of views [V, N, ...]) -> UncertaintyTerms`.
      augmentation: makes all views but the first, which is the un-augmented image.
      num_views: `V`, at least 1.
      seed: sets augmentation and sampling. All images use the same random draw, from the key
        `fold_in(seed's key, 0)`. So the terms of an image do not depend on its place or on other
        images, and terms of two images do not differ by their draws.
    """

    terms_of: Callable[[Any, Array, ViewOutputs], UncertaintyTerms]
    augmentation: View
    num_views: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, at_least in (("num_views", 1), ("seed", 0)):
            number = arguments.whole_number(name, getattr(self, name), at_least=at_least)
            object.__setattr__(self, name, number)


class FeatureExtractor:
    """Computes features in padded batches of one size, so that each image shape compiles once."""

    def __init__(
        self,
        model: JointEmbeddingModel,
        *,
        view: View,
        batch_size: int,
        terms: TermsSettings | None = None,
        rotated: RotatedViews | None = None,
        mesh: Mesh | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ):
        """Prepares the compiled forward pass.

        Args:
          model: networks.
          view: its un-augmented form is read, by `views.plain_views`.
          batch_size: number of images at once, rounded up to a multiple of the devices.
          terms: how JEVB's terms are computed; None leaves them out.
          rotated: the views of CSI's score; None leaves them out.
          mesh: devices that share a batch, from `parallel.make_mesh`; by default the first device
            of this process.
          check_stop: called before every batch; an error that it raises ends the work.

        Raises:
          ValueError: a size is below one.
          TypeError: a size is not a whole number.
        """
        batch_size = arguments.whole_number("batch_size", batch_size, at_least=1)
        self._mesh = parallel.make_mesh(jax.local_devices()[:1]) if mesh is None else mesh
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        self._check_stop = check_stop
        self._view = view

        def forward(variables: Any, images: Array) -> Features:
            views = plain_views(images, view)
            apply: Any = model.apply
            if terms is None:
                return Features(*apply(variables, views, train=False), terms=None, labels=None)
            key = jax.random.fold_in(jax.random.key(terms.seed), 0)
            keys = jnp.broadcast_to(key, (len(images),))
            view_keys = jax.vmap(lambda view: jax.vmap(jax.random.fold_in, (0, None))(keys, view))(
                jnp.arange(1, terms.num_views)
            )
            augmentation = terms.augmentation
            augmented = jax.vmap(lambda k: random_views(k, images, augmentation))(view_keys)
            # All views form one batch, so that the network is compiled once and not for each view.
            stacked = jnp.concatenate([views[None], augmented])
            flat = apply(variables, stacked.reshape(-1, *views.shape[1:]), train=False)
            outputs: ViewOutputs = jax.tree.map(
                lambda x: x.reshape(stacked.shape[0], -1, *x.shape[1:]), flat
            )
            values = terms.terms_of(variables, jax.random.fold_in(key, 0), outputs)
            first = jax.tree.map(lambda x: x[0], outputs)
            return Features(*first, terms=values, labels=None)

        def forward_and_rotate(variables: Any, images: Array) -> Features:
            def embed(views: Array) -> Array:
                apply: Any = model.apply
                return apply(variables, views, train=False).embedding

            rotations: Any = None if rotated is None else rotated.mean_embeddings(embed, images)
            return forward(variables, images)._replace(rotations=rotations)

        self._forward = jax.jit(
            forward if rotated is None else forward_and_rotate,
            out_shardings=parallel.replicated(self._mesh),
            compiler_options=network_options(),
        )

    def of_batch(self, variables: Any, images: np.ndarray) -> Features:
        """Features of one whole batch.

        Args:
          variables: parameters and running statistics.
          images: `[rows, h, w, c]`, uint8, or float32 in [0, 1]: the rows of this process in a
            batch of `batch_size` images. `c` is 1 or the network's number of channels. Or features
            `[rows, F]` or `[rows, V, F]`.

        Returns:
          Features of the whole batch, on the first device of every process.
        """
        variables = parallel.put(variables, parallel.replicated(self._mesh))
        over_data = parallel.over_data(self._mesh)
        images = with_all_channels(images, self._view)
        features = self._forward(variables, parallel.put_local_rows(images, over_data))
        return parallel.on_local_device(features)

    def stream(self, variables: Any, source: ImageSource) -> Iterator[tuple[Features, np.ndarray]]:
        """Yields features of `source` in order, in batches; memory does not grow with the source.

        Args:
          variables: parameters and running statistics.
          source: images or features. Gray images are repeated to the network's number of channels.

        Yields:
          features: of `batch_size` images, or fewer if the source is much smaller; the whole batch,
            on the first device of every process.
          mask: bool, one for each image; False for padding of the last batch.

        Raises:
          ValueError: for the reasons of `views.check_source`.
        """
        check_source(source, self._view)
        variables = parallel.put(variables, parallel.replicated(self._mesh))
        is_shared = self._mesh.is_multi_process
        size = useful_batch_size(self._batch_size, len(source))
        size = -(-size // self._mesh.size) * self._mesh.size
        rows = parallel.local_rows(size) if is_shared else slice(None)
        batches = evaluation_batches(source, size, rows=rows)
        for images, mask in batches:
            self._check_stop()
            yield self.of_batch(variables, images), mask

    def __call__(self, variables: Any, source: ImageSource) -> Features:
        """Features of every image of `source`, in its order, on the host.

        Raises:
          ValueError: for the reasons of `views.check_source`.
        """
        parts = [
            jax.tree.map(lambda values, mask=mask: np.asarray(values)[mask], jax.device_get(part))
            for part, mask in self.stream(variables, source)
        ]
        whole: Any = jax.tree.map(lambda *values: np.concatenate(values), *parts)
        return whole._replace(labels=source.labels)
