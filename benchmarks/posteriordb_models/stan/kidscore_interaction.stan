data {
  int<lower=1> N;
  vector[N] kid_score;
  vector[N] mom_iq;
  vector[N] mom_hs;
}
transformed data {
  matrix[N, 4] X = [rep_vector(1, N)', mom_hs', mom_iq', (mom_hs .* mom_iq)']';
}
parameters {
  vector[4] beta;
  real<lower=0> sigma;
}
model {
  sigma ~ cauchy(0, 2.5);
  kid_score ~ normal(X * beta, sigma);
}
