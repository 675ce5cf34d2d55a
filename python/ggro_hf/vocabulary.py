"""Do two tokenizers give the same ids to the same tokens? The gradient of a reward is only meaningful if they do."""

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def check_shared_vocabulary(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase, table_rows: int) -> None:
    """Raise ValueError unless every token of the policy has the same id for the reward model, and a row in its table.

    The whole vocabulary is compared. A reward model may have more tokens than the policy (a padding token, say).
    """
    reward_ids = reward.get_vocab()
    policy_ids = policy.get_vocab()
    different = [(token, index) for token, index in policy_ids.items() if reward_ids.get(token) != index]
    if different:
        token, index = min(different, key=lambda entry: entry[1])
        raise ValueError(
            f"policy and reward model do not share a vocabulary: {len(different)} of {len(policy_ids)} tokens differ, "
            f"first {token!r} (policy id {index}, reward id {reward_ids.get(token)}); "
            "use a reward model built on the policy's tokenizer"
        )
    largest = max(policy_ids.values())
    if largest >= table_rows:
        raise ValueError(
            f"the policy's tokens reach id {largest}, but the reward model's embedding table has {table_rows} rows; "
            "use a reward model built on the policy's tokenizer"
        )
