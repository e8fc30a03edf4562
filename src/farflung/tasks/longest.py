"""Trainer: how long a text of a run can become, for models that agree with themselves up to a length only."""

from farflung.config import Config
from farflung.envs.child import ScorerChild
from farflung.tasks.create_run import Model, with_length


async def longest_text(config: Config) -> int:
    """Tokens of the longest prompt of either split and of the longest completion."""
    env, model = config.env, Model(config.model.path)
    options = {"python": env.python} if env.python else {}
    async with ScorerChild(env.name, env.args, **options) as child:
        tasks = [*await child.tasks("train", env.train_tasks), *await child.tasks("eval", env.eval_tasks)]
    longest = max((len(model.prompt_ids(with_length(config, task, prompt)[0])) for task, prompt in tasks), default=0)
    return longest + config.generate.max_new_tokens
