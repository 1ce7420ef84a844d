"""Fields of OpenAI's, vLLM's and SGLang's requests that change the prompt or the answer, and that we don't run.

To ignore one would be to answer another question than the one that was asked. So each is a 400, except with a value
that changes nothing. A field that is in no table here and in no schema changes nothing, or is nobody's: it is ignored.
"""

from server.api.http.fields import NoOps

RENDERING: NoOps = {
    # What a conversation is made into.
    "documents": (None, []),
    "chat_template": (None,),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "reasoning": (None,),
    "reasoning_effort": (None,),
    "thinking": (None,),
    "enable_thinking": (None,),
    "task": (None,),
}

STRUCTURED: NoOps = {
    # What holds an answer to a form (`StructuredFields`), which comparisons do not.
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
}

CHOICES: NoOps = {
    # What may be generated.
    "structural_tag": (None,),
    "guided_decoding_backend": (None,),
    "guided_whitespace_pattern": (None,),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "bad_words": (None, []),
    "logit_processor": (None,),
    "logits_processors": (None, []),
    "custom_logit_processor": (None,),
    "custom_params": (None, {}),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
    "lora_path": (None,),
    # How long it gets, and how it is searched for.
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "early_stopping": (None, False),
    "min_new_tokens": (None, 0),
    "max_new_tokens": (None,),
    "stop_regex": (None, []),
    "repetition_detection": (None,),
    "thinking_token_budget": (None, -1),
    # The prompt.
    "suffix": (None,),
    "prompt_embeds": (None,),
    "truncation_side": (None, "left"),
    "session_params": (None, {}),
    "kv_transfer_params": (None, {}),
    "ec_transfer_params": (None, {}),
    # What is answered.
    "no_stop_trim": (None, False),
    "spaces_between_special_tokens": (None, True),
    "stream_interval": (None, 1),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "return_token_offsets": (None, False),
    "return_prompt_text": (None, False),
    "return_hidden_states": (None, False),
    "return_routed_experts": (None, False),
    "return_cached_tokens_details": (None, False),
}

COMPLETIONS: NoOps = {
    **CHOICES,
    "tools": (None, []),
}

GENERATION: NoOps = {**STRUCTURED, **COMPLETIONS}

CHAT: NoOps = {
    **CHOICES,
    **RENDERING,
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "echo": (None, False),
    "include_reasoning": (None, True),
    "separate_reasoning": (None, True),
    "stream_reasoning": (None, True),
    "state_id": (None,),
}
