"""The objectives that the equalities are checked for."""

from __future__ import annotations

from nearfield.encoders.token_config import DecoderConfig
from nearfield.objectives.config import (
    FocalConfig,
    HardnessConfig,
    InfoNCEConfig,
    MatryoshkaConfig,
    MixingConfig,
    ObjectiveSettings,
    ScoreMaskConfig,
    SpreadConfig,
)
from nearfield.objectives.kinds import (
    CombinedConfig,
    CoSENTConfig,
    EmbeddingDistillationConfig,
    MaskedTokensConfig,
    NTXentConfig,
    PartConfig,
    ScoreDistillationConfig,
    SigLIPConfig,
    SimCSEConfig,
    SupConConfig,
    TripletConfig,
    UnicomConfig,
)
from nearfield.objectives.label_kinds import HiPrBERTConfig, SBCLConfig, SimLAPConfig
from nearfield.objectives.more_kinds import CAROLConfig, CMIMConfig, MCSEConfig

SEVERAL = "infonce and cosent at once, each of its source"
VIEWS = "simcse of one source beside infonce of another"
WEIGHTED = "infonce, guide mask, examples with weights"
OBJECTIVES: dict[str, ObjectiveSettings] = {
    "infonce": InfoNCEConfig(temperature=0.1),
    "infonce, both directions": InfoNCEConfig(temperature=0.1, both_directions=True),
    "infonce, log-sum of positives": InfoNCEConfig(temperature=0.1, several_positives="log_sum"),
    "infonce, own documents only": InfoNCEConfig(temperature=0.1, in_batch_negatives=False),
    "infonce, learnt temperature": InfoNCEConfig(temperature=0.1, both_directions=True, learn_temperature=True),
    "infonce, four directions in tiles": InfoNCEConfig(
        temperature=0.1,
        directions=("query_document", "query_query", "document_query", "document_document"),
        implementation="blockwise",
    ),
    "infonce, score mask, hardness, focal": InfoNCEConfig(
        temperature=0.1,
        score_mask=ScoreMaskConfig(margin=0.3),
        hardness=HardnessConfig(alpha=2.0, detach=False),
        focal=FocalConfig(detach=False),
    ),
    "infonce, mixing, prefixes, spread": InfoNCEConfig(
        temperature=0.1,
        mixing=MixingConfig(),
        matryoshka=MatryoshkaConfig(dimensions=(8, 16)),
        spread=SpreadConfig(),
    ),
    "infonce, queue of earlier positives": InfoNCEConfig(temperature=0.1, queue=4),
    WEIGHTED: InfoNCEConfig(temperature=0.1, guide_mask=ScoreMaskConfig()),
    "cosent": CoSENTConfig(),
    "triplet": TripletConfig(margin=1.0),
    "supcon": SupConConfig(class_weights="inverse"),
    "siglip": SigLIPConfig(),
    "unicom, a part of prototypes and features": UnicomConfig(classes=0.8, features=0.5),
    "simcse": SimCSEConfig(),
    "ntxent": NTXentConfig(temperature=0.1),
    "masked tokens, with a decoder": MaskedTokensConfig(share=0.4, decoder=DecoderConfig(share=0.5, weight=0.7)),
    "masked next tokens beside infonce": CombinedConfig(
        parts=(
            PartConfig(objective=InfoNCEConfig(temperature=0.1)),
            PartConfig(objective=MaskedTokensConfig(predict="next", share=0.5), weight=0.3),
        )
    ),
    "sbcl, subclasses of labels": SBCLConfig(),
    "hiprbert, levels of labels": HiPrBERTConfig(),
    "simlap, gates of pairs of labels": SimLAPConfig(label_width=8, hidden=8, project=16, project_hidden=8),
    "carol, decoding and contrast": CAROLConfig(delete=0.0, inner=8),
    "cmim": CMIMConfig(inner=8),
    "mcse, texts and features of pictures": MCSEConfig(weight=0.5, projection=16),
    "distillation of scores, own and in batch": CombinedConfig(
        parts=(
            PartConfig(objective=ScoreDistillationConfig()),
            PartConfig(objective=ScoreDistillationConfig(loss="margin_mse")),
            PartConfig(objective=ScoreDistillationConfig(teacher="vectors", candidates="in_batch")),
        )
    ),
    "distillation of embeddings, projected": EmbeddingDistillationConfig(),
    VIEWS: CombinedConfig(
        parts=(
            PartConfig(objective=SimCSEConfig(temperature=0.1), sources=("a",)),
            PartConfig(objective=InfoNCEConfig(temperature=0.1), sources=("b",), weight=0.8),
        )
    ),
    SEVERAL: CombinedConfig(
        parts=(
            PartConfig(objective=InfoNCEConfig(temperature=0.1, learn_temperature=True), sources=("a",)),
            PartConfig(objective=CoSENTConfig(), sources=("b",), weight=0.8),
        )
    ),
}
"""Every shipped objective, with the options that change which cells of the logits count."""
