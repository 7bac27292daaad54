"""Keys that hold nothing that a model is to learn: where a row comes from, how it was made or judged, who sent it."""

from __future__ import annotations

from collections.abc import Collection

_HARMLESS = """
id idx index _id uid uuid guid row_id example_id sample_id conversation_id conv_id dialog_id prompt_id question_id
message_id thread_id doc_id docid ids __index_level_0__ hash md5 sha sha1 sha256 checksum
source sources src origin data_source dataset dataset_name data_name corpus subset split config file file_name
filename file_path filepath path url uri link repo repo_name domain dump crawl license licence copyright citation
lang language languages language_score lang_score langdetect script locale
category categories subcategory topic topics task task_name task_type type_of_task type kind tag tags label_source
difficulty
level grade subject
date time timestamp created created_at created_time create_time updated_at added version revision
meta metadata meta_data stats
score scores quality quality_score rating ratings score_chosen score_rejected chosen_score rejected_score
chosen_rating rejected_rating chosen_model rejected_model margin reward rewards perplexity ppl toxicity
model model_name model_id generator engine author annotator annotators annotator_id user_id worker_id created_by
length len num_tokens token_count n_tokens tokens_count char_count word_count num_turns n_turns turn
parallel_tool_calls redacted openai_moderation
"""
# Of rows that are dialogues or pairs; a document may need them (its title, say).
_OF_SAMPLES = """
title answer_from human_verified source_type cot_type problem_type problem_source question_type views avatarUrl
skip_prompt_formatting gen_input_configs difficulty_generator input_quality quality_explanation quality_generator
task_category other_task_category task_category_generator llama_guard_2 reward_model instruct_reward
min_neighbor_distance repeat_count min_similar_uuid instruction_length response_length tokenized
task_name_in_eng ds_name _template_idx _template_type _task_source _task_name tstamp anony toxic_chat_tag
num_responses good_natured
conversation_hash hashed_ip used_in_training ind activity_label source_id split_type
post_id upvote_ratio c_root_id_A c_root_id_B created_at_utc_A created_at_utc_B score_A score_B seconds_difference
score_ratio model_a model_b response_0_source response_1_source prompt_source judge qid
parent_id dialogue_id traj_id instance_id language_code annotation_type detoxify_moderation toxic full_topic
chosen_avg_rating rejected_avg_rating rating_chosen rating_rejected chosen-rating rejected-rating chosen-model
rejected-model overall_quality helpfulness correctness coherence complexity verbosity average_test_score
is_response_0_safe is_response_1_safe problem_is_valid solution_is_valid
prompt_tokens_len reasoning_content_len content_len
"""
_OF_MESSAGE = """
id _id index timestamp created created_at create_time model turn tokens token_count end_turn language toxic
message_id parent_id turn_identifier redacted hashed_ip
"""

# Of a file that is one object, beside the list of its rows.
_OF_FILE = """
description info name status success code msg message error total count page page_size pageSize num_rows num_samples
size format schema release object has_more first_id last_id homepage contributors contributor canary keywords
"""

HARMLESS = frozenset(_HARMLESS.split())
HARMLESS_OF_SAMPLES = HARMLESS.union(_OF_SAMPLES.split())
HARMLESS_OF_FILE = HARMLESS_OF_SAMPLES.union(_OF_FILE.split())
HARMLESS_OF_MESSAGE = frozenset(_OF_MESSAGE.split())


def harmless(key: str, value: object, names: Collection[str]) -> bool:
    """Whether a key is one of ``names``, a label that is a set of categories and no verdict, or a table's index."""
    if key == "" or key.startswith("Unnamed: "):  # a column without a name, as pandas writes it and reads it again
        return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    if key in ("turns", "items"):  # how many there are
        return isinstance(value, int) and names is HARMLESS_OF_SAMPLES
    return key in names or (key == "label" and isinstance(value, (dict, list)) and names is HARMLESS_OF_SAMPLES)
