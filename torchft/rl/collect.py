"""Where training's episodes come from: prompts in order, the engine, the rewards; each of several ranks does a part."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch

from torchft.adapters.lora import lora_layers
from torchft.config import Component, Kind, Range
from torchft.data.prompts import Prompt, PromptLoader
from torchft.errors import UserError
from torchft.generation.compiled import Compile
from torchft.generation.engine import Engine
from torchft.generation.loaded import engine
from torchft.generation.sampling import Sampling
from torchft.losses.policy import group_advantages
from torchft.modules.decoder import Decoder
from torchft.modules.sharded import gathered
from torchft.ranks import agree, gather
from torchft.rl.curves import rollout_row
from torchft.rl.remote import RemoteEngine, ServerConfig
from torchft.rl.rollout import Episode, rollout
from torchft.rl.scoring import RewardConfig, Scorer, Scores, choose
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training.distributed import World
from torchft.training.metrics import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The ``rollout:`` section of a config: what is generated in a step, and how it is judged."""

    rewards: list[RewardConfig]
    reward_timeout_s: Annotated[float, Range(above=0)] = 5.0  # of one reward of one answer, which else is left out
    prompts_per_step: Annotated[int, Range(min=1)] = 64  # of all devices
    group_size: Annotated[int, Range(min=1)] = 8  # answers to each prompt
    sampling: Sampling = field(default_factory=Sampling)
    num_slots: Annotated[int, Range(min=1)] = 256  # answers that a device computes together, or asks a server for
    compile: Compile = "auto"  # torch.compile the step of a token: a slower first rollout, faster ones; auto: on a GPU
    server: ServerConfig | None = None  # a vLLM server that answers in place of the trained model itself
    environment: Annotated[Component, Kind("environment")] | None = None  # what answers the model's turns: tools
    max_turns: Annotated[int, Range(min=1)] = 1
    resample: Annotated[int, Range(min=0)] = 0  # rounds of further prompts, in place of groups with equal rewards

    @property
    def episodes_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def max_tokens(self) -> int:
        """That the model may choose in an episode, of all its turns."""
        return self.max_turns * self.sampling.max_new_tokens

    def problems(self, seq_len: int) -> list[str]:
        """For a recipe's ``conflicts``."""
        found = []
        if self.sampling.temperature == 0:
            found.append("rollout.sampling.temperature: at 0 all answers are the same, and nothing is learned")
        if not self.rewards:
            found.append("rollout.rewards: without any there is nothing to learn")
        if self.max_turns > 1 and not self.environment:
            found.append("rollout.max_turns: nobody answers the model's turns; give an environment")
        if self.resample and self.group_size < 2:
            found.append(
                "rollout.resample: single answers never differ, so that every round would be taken; leave it 0"
            )
        if self.sampling.max_new_tokens >= seq_len:
            found.append("rollout.sampling.max_new_tokens: no room for a prompt in seq_len")
        return found


class Rollouts:
    """All ranks make one, and call it alike; each answers its part of the prompts, with whole weights meanwhile; tp
    ranks together, each with its heads. Ranks that share rows then have each other's episodes.

    What is drawn is decided by the seed and a prompt's number: there is no generator whose state would have to be
    saved.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        seq_len: int,
        seed: int,
        world: World,
        publish: Callable[..., Path],
    ) -> None:
        """``publish``: as for RemoteEngine, whose server may be asked for."""
        self._number, self._count = world.rank // world.tokens.tp, world.size // world.tokens.tp  # who answers alone
        if config.prompts_per_step % self._count:
            each = "processes" if world.tokens.tp == 1 else f"groups of parallel.tp {world.tokens.tp}"
            raise UserError(
                f"rollout.prompts_per_step: {config.prompts_per_step} is not a multiple of the {self._count} {each}",
                is_shared=True,
            )
        if world.tokens.tp > 1 and config.environment:
            raise UserError(
                "rollout.environment: each of the parallel.tp ranks would have its own, which may say another thing: "
                "use parallel.shard",
                is_shared=True,
            )
        self.loader = PromptLoader(prompts, seed=seed)
        self._config, self._tokenizer, self._seed, self._world = config, tokenizer, seed, world
        self._own = config.prompts_per_step // self._count
        slots = min(config.num_slots, self._own * config.group_size)
        self._engine: Engine | RemoteEngine
        if config.server:
            self._engine = RemoteEngine(
                config.server,
                publish,
                adapters=bool(lora_layers(model)),
                num_slots=slots,
                max_len=seq_len,
                stop_ids=tokenizer.stop_ids,
                temperature=config.sampling.temperature,
            )
        else:
            self._engine = engine(model, tokenizer, num_slots=slots, max_len=seq_len, compile=config.compile)
        self._scorer = Scorer(config.rewards, timeout_s=config.reward_timeout_s)
        self._told_long = False

    def num_steps(self, *, epochs: int, max_steps: int | None) -> int:
        """Of a run: those of ``epochs``, or ``max_steps`` if they are fewer."""
        steps = epochs * math.ceil(len(self.loader.prompts) / self._config.prompts_per_step)
        return min(steps, max_steps or steps)

    def next(self) -> tuple[list[Episode], Scores]:
        """The episodes of a step whose rows this rank has (`World.data_rank`), a group after the other, and their
        scores. The engine's memory is freed.

        Groups with equal rewards are replaced by those of further prompts, as ``resample`` allows.
        """
        g, own = self._config.group_size, self._own
        episodes: list[Episode] = []
        found: list[Scores] = []
        for _ in range(1 + self._config.resample):
            first = self.loader.taken + self._number * own
            prompts = self.loader.take(self._config.prompts_per_step)[self._number * own :][:own]
            new = self._episodes(prompts, self._config.sampling, group_size=g, first=first)
            episodes += new
            found.append(self._scorer.score([episode.attempt for episode in new]))
            totals = torch.cat([scores.total for scores in found]).view(-1, g)
            teaches = group_advantages(totals).ne(0).any(1)
            missing = torch.tensor([max(0, own - int(teaches.sum()))], device=self._world.device)
            if not self._world.sum(missing):
                break
        self._engine.release()
        chosen = (~teaches).to(torch.int8).argsort(stable=True)[:own].sort().values  # those that teach, first
        numbers = [int(group) * g + i for group in chosen for i in range(g)]
        return self._shared([episodes[i] for i in numbers], choose(found, numbers))

    def held_out(self, prompts: Sequence[Prompt]) -> Row:
        """Rewards of a greedy answer to each of ``prompts``, of all ranks."""
        own = prompts[self._number :: self._count]
        episodes = self._episodes(own, replace(self._config.sampling, temperature=0.0), group_size=1, first=0)
        self._engine.release()
        scores = self._scorer.score([episode.attempt for episode in episodes])
        return rollout_row(episodes, scores, group_size=1, copies=self._world.tokens.tp, prefix="eval_")

    def _tell_long(self, episodes: Sequence[Episode]) -> None:
        """All ranks: the first prompt that leaves no room for an answer, once; all are counted as ended/too_long."""
        own = next(((e.prompt.where, len(e.tokens)) for e in episodes if e.finish == "too_long"), None)
        found = None if self._told_long else next(filter(None, gather(own)), None)
        if found:
            self._told_long = True
            log.warning(
                "%s: its %d tokens leave no room for an answer in seq_len %d; such prompts teach nothing, and are "
                "counted: raise seq_len, or leave them out",
                *found, self._engine.max_len,
            )  # fmt: skip

    def row(self) -> Row:
        """All ranks: how often a server was asked again so far, if it was."""
        if not isinstance(self._engine, RemoteEngine):
            return {}
        retries = sum(gather(self._engine.num_retries))
        return {"server_retries": retries} if retries else {}

    def _shared(self, episodes: list[Episode], scores: Scores) -> tuple[list[Episode], Scores]:
        """All ranks: of the ranks that share rows those of all cp ranks, and of tp ranks the first one's scores."""
        tokens, first = self._world.tokens, self._world.data_rank * self._world.tokens.count
        if tokens.count == 1:
            return episodes, scores
        ended = [replace(episode, environment=None) for episode in episodes]  # which need not be picklable
        parts = gather((ended, scores))[first : first + tokens.count : tokens.tp]
        episodes = [episode for own, _ in parts for episode in own]
        return episodes, choose([own for _, own in parts], range(len(episodes)))

    def _episodes(self, prompts: Sequence[Prompt], how: Sampling, *, group_size: int, first: int) -> list[Episode]:
        environment = self._config.environment

        def answered() -> list[Episode]:
            return rollout(
                self._engine,
                self._tokenizer,
                prompts,
                sampling=how,
                group_size=group_size,
                seed=self._seed,
                first=first,
                environment=environment.build if environment else None,
                max_turns=self._config.max_turns,
            )

        if isinstance(self._engine, RemoteEngine):
            self._engine.update()
        episodes, problem = list[Episode](), None
        try:
            if isinstance(self._engine, Engine):
                with gathered(self._engine.model):
                    episodes = answered()
                    if self._world.mesh:  # the next gathered weights lie elsewhere, where no recorded step looks
                        self._engine.release()
            else:
                episodes = answered()
        except UserError as e:  # of one rank, for whom the others would wait
            problem = e
        agree(problem)
        self._tell_long(episodes)
        return episodes
