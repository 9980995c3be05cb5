"""What the engine holds of images that are encoded: their features, or what these were merged into."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from trimming.clustering import Clustering, merge_clusters
from trimming.engine.sequence import Encoded, Members
from trimming.merging import first_members, follow, sums_by
from trimming.tower import Encoding, TowerPolicy


def encoded_images(tiles: int, encoding: Encoding, clustering: Clustering | None) -> list[Encoded]:
    """Images of ``tiles`` real tiles each. ``clustering``: by what their real tiles' features are merged, or what the tower has
    left of them; padding never joins. What is merged has no padding any more."""
    count, group, sizes = encoding.real, encoding.group, encoding.sizes
    real = encoding.features[:, :count]
    clusters = [None] * len(real) if clustering is None else merge_clusters(real, clustering(real), sizes)
    places = None if group is None else first_members(group, count)
    encoded: list[Encoded] = []
    members: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for row, (whole, found) in enumerate(zip(encoding.features, clusters, strict=True)):
        merged = None if found is None or len(found.places) == count else found
        attention = None if encoding.class_attention is None else encoding.class_attention[row]
        if merged is not None and attention is not None:
            attention = sums_by(attention[None, :, None], merged.cluster[None], len(merged.places))[0, :, 0]
        if group is None and merged is not None:
            members[row] = merged.sizes, merged.places, merged.cluster
        elif group is not None and merged is not None:
            into = follow(group[row : row + 1], merged.cluster[None])
            members[row] = merged.sizes, first_members(into, len(merged.places))[0], into[0]
        elif group is not None:
            assert sizes is not None
            assert places is not None
            members[row] = sizes[row], places[row], group[row]
        features = whole if merged is None else merged.features
        encoded.append(Encoded(tiles, _own(features), None if attention is None else _own(attention)))
    if members:
        # In one piece to the CPU, behind the counts of clusters, for which all have waited anyhow.
        parts = [part for several in members.values() for part in several]
        told = iter(torch.cat([part.double() for part in parts]).cpu().split([len(part) for part in parts]))
        for row in members:
            encoded[row].members = Members(next(told).float(), next(told).long(), next(told).long())
    return encoded


def encoding_of(image: Encoded, tokens: int) -> Encoding:
    """An image of tiles of ``tokens`` each, as the tower has left it."""
    attention, members, device = image.class_attention, image.members, image.features.device
    return Encoding(
        image.features[None],
        image.real(tokens),
        None if attention is None else attention[None],
        None if members is None else members.cluster.to(device)[None],
        None if members is None else members.sizes.to(device)[None],
    )


def _own(part: Tensor) -> Tensor:
    """A copy of what is part of more: it would keep all of a batch's images."""
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


class ImageCache:
    """Images by key, the longest unused dropped first. A prompt that waits for its prefill holds on to its images by itself."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._images: OrderedDict[tuple[str, Clustering | None, TowerPolicy | None], Encoded] = OrderedDict()

    def get(self, key: str, clustering: Clustering | None = None, tower: TowerPolicy | None = None) -> Encoded | None:
        """The image as this tower policy has left it, its features merged like this, or all there."""
        place = key, clustering, tower
        if place in self._images:
            self._images.move_to_end(place)
        return self._images.get(place)

    def put(self, key: str, image: Encoded, clustering: Clustering | None = None, tower: TowerPolicy | None = None) -> None:
        self._images[key, clustering, tower] = image
        size = sum(image.bytes for image in self._images.values())
        while self._images and size > self.limit_bytes:
            size -= self._images.popitem(last=False)[1].bytes

    def __len__(self) -> int:
        return len(self._images)

    def clear(self) -> None:
        self._images.clear()
