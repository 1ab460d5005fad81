"""Tree attention: queries and keys are routed through learned binary trees (Treeformer, arXiv 2208.09015,
ICLR 2023).

``tf_attention`` attends the keys of the query's leaf, ``tc_attention`` reads means of values along the
query's path. Both are architectures to be trained, with ``fastattn_compile.retrofitting.bootstrap``; converting a
trained model without training loses far more than a window of equal cost does (specification 12 and 13).

Patent notice: a Google patent application, US 2024/0005131 A1, "Attention neural networks with tree attention
mechanisms" (filed 28 June 2023, priority IN 202221037019 of 28 June 2022), covers the mechanism. Take legal
advice before you ship a product that uses these two operators.
"""

from fastattn_compile.operators.treeformer.config import TcConfig, TfConfig
from fastattn_compile.operators.treeformer.losses import balance_loss, mass_loss
from fastattn_compile.operators.treeformer.tc import TreeCoarseAttention
from fastattn_compile.operators.treeformer.tf import TreeLeafAttention

__all__ = ["TcConfig", "TfConfig", "TreeCoarseAttention", "TreeLeafAttention", "balance_loss", "mass_loss"]
