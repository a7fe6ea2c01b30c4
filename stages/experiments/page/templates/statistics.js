// Means and paired differences with clustered errors, as in stages/evaluation/statistics.py and stages/experiments/paired.py.
"use strict";

/** The quantile of Student's t for an interval; degrees of freedom that are not tabulated are rounded down. */
function studentQuantile(quantiles, freedom) {
  let found = freedom;
  while (!(found in quantiles)) found -= 1;
  return quantiles[found];
}

/** The mean of values. clusters: of each value what it shares with others, or how many values there are if each is alone. added: values
 * more, each of a cluster of its own; the correction for few clusters and the degrees of freedom leave them out. */
function estimateMean(values, clusters, added = []) {
  const size = values.length + added.length;
  let total = 0;
  for (const one of values) total += one;
  for (const one of added) total += one;
  const value = total / size;
  let [count, squares] = [values.length, 0];
  if (Array.isArray(clusters)) {
    const sums = new Map();
    values.forEach((one, index) => sums.set(clusters[index], (sums.get(clusters[index]) || 0) + one - value));
    count = sums.size;
    for (const sum of sums.values()) squares += sum * sum;
  } else {
    for (const one of values) squares += (one - value) * (one - value);
  }
  if (count < 2) return { value, stderr: null, count: size, clusters: count };
  for (const one of added) squares += (one - value) * (one - value);
  return { value, stderr: Math.sqrt((squares * count) / (count - 1)) / size, count: size, clusters: count };
}

/** The mean of independent estimates, each counting alike; its interval is recovered from theirs (Zou and Donner 2008). */
function meanOfEstimates(estimates, quantiles) {
  const size = estimates.length;
  const value = estimates.reduce((total, one) => total + one.value, 0) / size;
  const count = estimates.reduce((total, one) => total + one.count, 0);
  const clusters = estimates.reduce((total, one) => total + one.clusters, 0);
  const stderr = estimates.some((one) => one.stderr === null) ? null : Math.hypot(...estimates.map((one) => one.stderr)) / size;
  const intervals = estimates.map((one) => intervalOf(one, quantiles));
  if (intervals.includes(null)) return { value, stderr, count, clusters, ends: null };
  const below = Math.hypot(...estimates.map((one, index) => one.value - intervals[index][0])) / size;
  const above = Math.hypot(...estimates.map((one, index) => intervals[index][1] - one.value)) / size;
  return { value, stderr, count, clusters, ends: [value - below, value + above] };
}

/** The 95% interval of an estimate; null without an error. ends: an interval of another kind that an estimate has. */
function intervalOf(estimate, quantiles) {
  if (estimate.ends !== undefined) return estimate.ends;
  if (estimate.stderr === null) return null;
  const reach = studentQuantile(quantiles, estimate.clusters - 1) * estimate.stderr;
  return [estimate.value - reach, estimate.value + reach];
}

/** The difference on the rows of a task; of right and wrong answers with one row more that is lost and one that is gained, for its interval. */
function differenceOfRows(ours, theirs, clusters, quantiles) {
  const values = new Array(ours.length);
  for (let index = 0; index < values.length; index += 1) values[index] = ours[index] - theirs[index];
  const estimate = estimateMean(values, clusters);
  const isShare = (value) => value === 0 || value === 1;
  if (!ours.every(isShare) || !theirs.every(isShare)) return estimate;
  const ends = intervalOf(estimateMean(values, clusters, [1, -1]), quantiles);
  return { ...estimate, ends: ends && [Math.max(-1, ends[0]), Math.min(1, ends[1])] };
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

/** The difference in a task's score that both models have; of a group that weighs its tasks alike the mean over these. */
function differenceOfTask(group, task, own, ours, theirs, quantiles) {
  const [here, there] = [ours, theirs].map((model) => unpacked(model.rows[task][own]));
  const [clusters, parts] = [group.clusters[task], (group.parts[task] || {})[own]];
  if (!parts) return differenceOfRows(here, there, clusters, quantiles);
  const estimates = [...new Set(parts)].map((part) => {
    const of = (values) => [...values].filter((_, index) => parts[index] === part);
    const shared = Array.isArray(clusters) ? of(clusters) : parts.filter((one) => one === part).length;
    return differenceOfRows(of(here), of(there), shared, quantiles);
  });
  return meanOfEstimates(estimates, quantiles);
}

/** The difference of two models, ours less theirs, in a metric ({kind, name, metric, kept, scale, tasks}); null if either lacks it. */
function pairedDifference(group, metric, ours, theirs, quantiles) {
  const less = (here, there, clusters) => estimateMean(here.map((value, index) => metric.scale * (value - there[index])), clusters);
  if (metric.kind === "corpus") {
    const [here, there] = [ours, theirs].map((model) => (model.windows[metric.name] || {})[metric.kept]);
    return here && there ? less(here, there, group.window_clusters[metric.name]) : null;
  }
  const tasks = metric.kind === "task" ? [[metric.name, metric.metric]] : metric.tasks;
  const known = ([task, own]) => [ours, theirs].every((model) => (model.rows[task] || {})[own]);
  if (!tasks.length || !tasks.every(known)) return null;
  const estimates = tasks.map(([task, own]) => differenceOfTask(group, task, own, ours, theirs, quantiles));
  return metric.kind === "task" ? estimates[0] : meanOfEstimates(estimates, quantiles);
}
