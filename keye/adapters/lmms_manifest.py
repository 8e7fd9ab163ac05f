"""The entry point `keye` of the group `lmms_eval.models`; importing it loads neither torch nor transformers."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="keye", chat_class_path="keye.adapters.lmms_eval.Keye", aliases=("keye_vl",))
