"""CAST: exact attention inside clusters of tokens, learned summaries of all other clusters.

Source: van Engelenhoven, Strisciuglio, Talavera, "CAST: Clustering self-Attention using Surrogate Tokens",
arXiv 2402.04239 (2024). No code of the authors is public; what the text leaves open is a field of
``CastConfig``.

The paper describes a layer, ``X -> W_o R``, with its own projections. Here CAST stands at a site of a model
that exists: its queries, keys and values are those of the site, and the layer maps to it like this.

* ``W_q, W_k, W_v, W_o`` stay the model's. ``tau`` is one over the site's scale.
* Surrogate tokens are parameters in the space of projected keys, one vector per cluster and key head (query
heads that
  share a key head share it). ``surrogate_space="input"``, surrogates that pass through ``W_q`` and ``W_k``,
  is served by learning the two images, since the projections are not at hand.
* The gate ``phi = X W_phi + b`` is computed from the queries of all heads instead of ``X``. Where ``W_q`` is
square and
  invertible the two say the same: ``X W_phi = Q (W_q^-1 W_phi)``. Rotary embeddings, which come before a
  site, make it depend on position; the same holds of the affinities.
* Dropout on attention weights is refused, as by every operator of this package.

``combine="lse"`` and ``clustering="token_choice"`` are this package's, not the paper's. The first is one
softmax over the tokens of the own clusters and one entry for every other cluster, which needs no learned mass
and serves pretrained models. The second is a causal form: every token chooses its cluster alone, meets the
last ``cluster_size`` members of it, and summaries of the others as they stood at its time.
"""

from fastattn_compile.operators.cast.config import CastConfig
from fastattn_compile.operators.cast.operator import CastAttention

__all__ = ["CastAttention", "CastConfig"]
