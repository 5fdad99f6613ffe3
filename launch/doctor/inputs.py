"""How large an experiment's model and facts are: from the model's config alone, and from the data file."""

from __future__ import annotations

from typing import Any

from pipeline.config import Experiment, Model
from pipeline.errors import InputError
from pipeline.facts.fact import read_facts
from pipeline.facts.read import read
from pipeline.models.check import unusable_config
from pipeline.models.packaged import resolve
from pipeline.models.tiny import tiny_config
from pipeline.needs import DataSize, ModelSize
from pipeline.plan import Plan

_CHARACTERS_PER_TOKEN = 4
_TEMPLATE_TOKENS = {"plain": 1, "alpaca": 40}
_OTHER_TEMPLATE_TOKENS = 30


def model_size(model: Model) -> ModelSize | str:
    """The model's size from its config, or why that is not known. Reads the local hub cache, or the hub.

    Raises InputError for a config that no model can be made of.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config: Any
    if model.tiny is not None:
        config = tiny_config(model.tiny, model.tiny.vocab_size)
    else:
        assert model.path is not None
        try:
            config = AutoConfig.from_pretrained(resolve(model.path), revision=model.revision)
        except (OSError, ValueError) as error:
            return f"the config of {model.path} cannot be read here ({' '.join(str(error).split())[:120]})"
        except Exception as error:
            raise unusable_config(f"model.path: {model.path}", error) from None
    try:
        with no_init_weights(), torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise unusable_config(f"model.path: {model.path}", error) from None
    module.tie_weights()
    text = config.get_text_config()
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    return ModelSize(num_parameters, text.num_hidden_layers, text.hidden_size, text.vocab_size)


def data_size(plan: Plan, experiment: Experiment) -> DataSize:
    """Counts of the facts that will be trained on: from the facts stage if it is done, else from the file,
    before filtering.
    """
    settings = experiment.facts
    chosen = plan.artifact(plan.facts)
    if chosen.is_complete:
        facts = list(read_facts(chosen.folder / "facts.jsonl"))
    else:
        facts = read(settings.path, settings.format, settings.old_answer).facts
    facts = facts[: settings.limit]
    if not facts:
        raise InputError(f"facts.path: no facts in {settings.path}")
    characters = sum(len(fact.prompt) + len(fact.new_answer) for fact in facts) / len(facts)
    template = _TEMPLATE_TOKENS.get(experiment.prompt.template, _OTHER_TEMPLATE_TOKENS)
    locality = sum(len(fact.locality) for fact in facts) / len(facts)
    related = sum(1 + len(fact.rephrasings) + len(fact.portability) for fact in facts) / len(facts)
    record_tokens = round(characters / _CHARACTERS_PER_TOKEN) + template + 2
    return DataSize(len(facts), record_tokens, locality, locality + related)
