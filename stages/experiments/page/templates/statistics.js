// Means and paired differences with clustered errors, as in stages/evaluation/statistics.py and stages/experiments/paired.py.
"use strict";

/** The quantile of Student's t for an interval; degrees of freedom that are not tabulated are rounded down. */
function studentQuantile(quantiles, freedom) {
  let found = freedom;
  while (!(found in quantiles)) found -= 1;
  return quantiles[found];
}

/** The mean of values. clusters: of each value what it shares with others, or how many values there are if each is alone. */
function estimateMean(values, clusters) {
  let total = 0;
  for (const one of values) total += one;
  const value = total / values.length;
  let [count, squares] = [values.length, 0];
  if (Array.isArray(clusters)) {
    const sums = new Map();
    values.forEach((one, index) => sums.set(clusters[index], (sums.get(clusters[index]) || 0) + one - value));
    count = sums.size;
    for (const sum of sums.values()) squares += sum * sum;
  } else {
    for (const one of values) squares += (one - value) * (one - value);
  }
  if (count < 2) return { value, stderr: null, count: values.length, clusters: count };
  return { value, stderr: Math.sqrt((squares * count) / (count - 1)) / values.length, count: values.length, clusters: count };
}

/** The mean of independent estimates, each counting alike, with Satterthwaite's degrees of freedom, rounded down. */
function meanOfEstimates(estimates) {
  const value = estimates.reduce((total, one) => total + one.value, 0) / estimates.length;
  const count = estimates.reduce((total, one) => total + one.count, 0);
  if (estimates.some((one) => one.stderr === null)) return { value, stderr: null, count, clusters: 1 };
  const variances = estimates.map((one) => one.stderr ** 2);
  const total = variances.reduce((sum, one) => sum + one, 0);
  const spread = estimates.reduce((sum, one, index) => sum + variances[index] ** 2 / (one.clusters - 1), 0);
  const all = estimates.reduce((sum, one) => sum + one.clusters - 1, 0);
  const freedom = spread ? Math.floor(total ** 2 / spread + 1e-9) : all;
  return { value, stderr: Math.sqrt(total) / estimates.length, count, clusters: 1 + freedom };
}

/** The 95% interval of an estimate; null without an error. adjusted: the estimate whose interval is taken instead, within -1 and 1. */
function intervalOf(estimate, quantiles) {
  if (estimate.stderr === null) return null;
  const of = estimate.adjusted || estimate;
  const reach = studentQuantile(quantiles, of.clusters - 1) * of.stderr;
  const ends = [of.value - reach, of.value + reach];
  return estimate.adjusted ? [Math.max(-1, ends[0]), Math.min(1, ends[1])] : ends;
}

/** The difference on the rows of a task; of right and wrong answers with one row more that is lost and one that is gained, for its interval. */
function differenceOfRows(ours, theirs, clusters) {
  const values = new Array(ours.length);
  for (let index = 0; index < values.length; index += 1) values[index] = ours[index] - theirs[index];
  const estimate = estimateMean(values, clusters);
  const isShare = (value) => value === 0 || value === 1;
  if (!ours.every(isShare) || !theirs.every(isShare)) return estimate;
  values.push(-1, 1);
  return { ...estimate, adjusted: estimateMean(values, Array.isArray(clusters) ? [...clusters, "lost", "gained"] : clusters) };
}

/** McNemar's exact test: how likely flips so one-sided are if both directions are equally likely; two-sided. */
function mcnemar(lost, gained) {
  const count = lost + gained;
  let logarithm = -count * Math.LN2;
  let tail = Math.exp(logarithm);
  for (let flips = 1; flips <= Math.min(lost, gained); flips += 1) {
    logarithm += Math.log(count - flips + 1) - Math.log(flips);
    tail += Math.exp(logarithm);
  }
  return Math.min(1, 2 * tail);
}

const unpackedScores = new WeakMap();

/** Scores of rows, from bits in base64 or from a list; bits are unpacked once. */
function unpacked(scores) {
  if (Array.isArray(scores)) return scores;
  if (!unpackedScores.has(scores)) {
    const [bytes, rows] = [atob(scores.bits), new Int8Array(scores.count)];
    for (let index = 0; index < rows.length; index += 1) rows[index] = (bytes.charCodeAt(index >> 3) >> (index & 7)) & 1;
    unpackedScores.set(scores, rows);
  }
  return unpackedScores.get(scores);
}

/** The difference of two models, ours less theirs, in a metric ({kind, name, metric, kept, scale, tasks}); null if either lacks it. */
function pairedDifference(group, metric, ours, theirs) {
  const less = (here, there, clusters) => estimateMean(here.map((value, index) => metric.scale * (value - there[index])), clusters);
  if (metric.kind === "corpus") {
    const [here, there] = [ours, theirs].map((model) => (model.windows[metric.name] || {})[metric.kept]);
    return here && there ? less(here, there, group.window_clusters[metric.name]) : null;
  }
  const tasks = metric.kind === "task" ? [[metric.name, metric.metric]] : metric.tasks;
  const both = tasks.filter(([task, own]) => [ours, theirs].every((model) => (model.rows[task] || {})[own]));
  const estimates = both.map(([task, own]) =>
    differenceOfRows(unpacked(ours.rows[task][own]), unpacked(theirs.rows[task][own]), group.clusters[task]),
  );
  if (!estimates.length) return null;
  return metric.kind === "task" ? estimates[0] : meanOfEstimates(estimates);
}
