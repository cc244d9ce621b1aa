"""The steps of a fine-tuning: each logged and kept, some measured, the best set aside.

Knows what a run is made of, and no folder of a base or of data.
"""

import time
from itertools import islice

from .loop import bars_aside, heldout_loss, train


class Steps:
    """The steps of `run`, of which `progress` is done.

    `run` has `config`, `learned`, `adam`, `batches`, `heldout` and `checkpoint`, as finetune.py
    makes them. `workers` compute the parts of each batch. `run_log` is a RunLog or None, `log` is
    called with a line for each evaluation.
    """

    def __init__(self, run, workers, progress, run_log, log, quiet):
        self.run = run
        self.workers = workers
        self.progress = progress
        self.run_log = run_log
        self.log = log
        self.quiet = quiet

    def measure_before(self):
        """Measure the held-out loss before the first step, unless that has been done."""
        if self.progress.before is None:
            self.progress.before = self._measure("held-out loss before")
            self._log_evaluation(self.progress.before)

    def take(self):
        """Take the steps that are left, or fewer if patience ends."""
        if self._is_hopeless():
            # The run was killed after its last evaluation.
            return
        run = self.run
        # What is measured between steps does not count: the clock starts again after it.
        clock = time.perf_counter()

        def after_step(n_done, loss, norm):
            nonlocal clock
            self.progress.losses.append(loss)
            self.progress.norms.append(norm)
            self.progress.seconds += time.perf_counter() - clock
            is_last = self._after_step(n_done, loss)
            clock = time.perf_counter()
            return is_last

        n_used = run.adam.steps * run.config.accumulate
        train(
            run.learned.model,
            run.adam,
            self.progress.count_tokens(islice(run.batches, n_used, None)),
            run.config.steps,
            schedule=run.config.rate,
            max_norm=run.config.clip,
            seed=run.config.seed,
            accumulate=run.config.accumulate,
            workers=self.workers,
            start=run.adam.steps,
            on_step=after_step,
            label="training",
            quiet=self.quiet,
        )

    def take_best(self):
        """Put the module back to where it was best; returns its held-out loss, None if it has none.

        Where nothing was measured on the way, it stays as it is after the last step.
        """
        if self.run.config.eval_every is None:
            after = self._measure("held-out loss after")
            self._log_evaluation(after)
            return after
        self.run.checkpoint.take_back_best()
        _, after = self.progress.best()
        return after

    def _after_step(self, n_done, loss):
        """Log the step, evaluate if it is time, keep what is needed to go on; was it the last?"""
        config = self.run.config
        is_last = n_done == config.steps
        self._log(loss=loss, lr=config.rate(n_done - 1))
        if config.eval_every is not None and (n_done % config.eval_every == 0 or is_last):
            self._evaluate()
        is_last = is_last or self._is_hopeless()
        is_due = is_last or n_done % config.save_every == 0
        if is_due and self.run_log is not None:
            # No checkpoint may be ahead of the log.
            self.run_log.sync()
        keep(self.run, self.progress, is_due)
        return is_last

    def _evaluate(self):
        """Measure the held-out loss between two steps. What is best so far is set aside."""
        step = len(self.progress.losses)
        loss = self._measure("held-out loss")
        self.progress.evaluations.append([step, loss])
        self._log_evaluation(loss)
        verdict = "the lowest so far"
        best_step, _ = self.progress.best()
        if best_step == step:
            self.run.checkpoint.mark_best()
        else:
            verdict = f"no better than after step {best_step}"
        with bars_aside():
            self.log(f"step {step}: held-out loss {loss:.4f}, {verdict}")

    def _is_hopeless(self):
        """Have so many evaluations in a row brought no improvement that the run is to end?"""
        patience = self.run.config.patience
        return patience is not None and self.progress.evaluations_since_best() >= patience

    def _measure(self, label):
        """The held-out loss, or None if nothing is held out."""
        run = self.run
        if run.heldout is None:
            return None
        batches = run.heldout.epoch(run.config.batch)
        label = None if self.quiet else label
        return heldout_loss(run.learned.model, batches, label, workers=self.workers)

    def _log_evaluation(self, loss):
        if loss is not None:
            self._log(eval_loss=loss)

    def _log(self, **measured):
        if self.run_log is not None:
            self.run_log.write(
                step=len(self.progress.losses),
                **measured,
                tokens=self.progress.tokens,
                seconds=self.progress.seconds,
            )


def keep(run, progress, is_due):
    """After a whole step: have what is needed to go on from here in memory, or, if due, in files.

    A copy of a whole model in memory, after each step, would cost more than it is worth.
    """
    if not run.learned.is_large:
        run.checkpoint.take_snapshot(progress.as_json())
        if is_due:
            run.checkpoint.save()
    elif is_due:
        run.checkpoint.save_current(progress.as_json())
