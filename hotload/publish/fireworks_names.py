"""Names of the Fireworks API: origins, paths, headers and resources (protocol §2).

The vendor's word *deployment* is our *service*.
"""

from __future__ import annotations

BASE_URL = "https://api.fireworks.ai"
API_KEY_VARIABLE = "FIREWORKS_API_KEY"
BASE_URL_VARIABLE = "FIREWORKS_BASE_URL"
HOSTED_BUCKET_TYPE = "FW_HOSTED"

HOT_LOAD_PATH = "/hot_load/v1/models/hot_load"
HINT_PATH = "/hot_load/v1/models/hot_load/hint"
INFERENCE_PREFIX = "/inference"
COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"  # below it
COMPLETIONS_PATH = f"{INFERENCE_PREFIX}{COMPLETIONS}"
CHAT_PATH = f"{INFERENCE_PREFIX}{CHAT}"
MODELS_PATH = f"{INFERENCE_PREFIX}{MODELS}"
ACCOUNTS_PATH = "/v1/accounts"

API_KEY_HEADER = "x-api-key"
MODEL_HEADER = "fireworks-model"
DEPLOYMENT_HEADER = "fireworks-deployment"
SESSION_HEADER = "x-multi-turn-session-id"
AFFINITY_HEADER = "x-session-affinity"
DRAIN_TIMEOUT_HEADER = "x-fireworks-hot-load-drain-timeout"
REQUEST_ID_HEADER = "x-request-id"
RESPONSE_ID_HEADERS = ("x-request-id", "x-fireworks-request-id", "cf-ray")

# protocol §4: `"alder32"` (that spelling). Ours is adler32 everywhere else.
FORMATS = {"compression_format": "arc_v2", "checksum_format": "alder32"}


def model_name(account_id: str, model_id: str) -> str:
    """Resource name of a model."""
    return f"accounts/{account_id}/models/{model_id}"


def deployment_name(account_id: str, deployment_id: str) -> str:
    """Resource name of a service, the vendor's deployment."""
    return f"accounts/{account_id}/deployments/{deployment_id}"


def deployment_path(deployment: str) -> str:
    """Control-plane path of a service, by its resource name."""
    return f"/v1/{deployment}"


def ledger_path(deployment: str) -> str:
    """Control-plane path of a service's ledger."""
    return f"{deployment_path(deployment)}/ledger"
