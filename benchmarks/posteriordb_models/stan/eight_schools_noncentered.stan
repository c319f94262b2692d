data {
  int<lower=1> J;
  vector[J] y;
  vector<lower=0>[J] sigma;
}
parameters {
  real mu;
  real<lower=0> tau;
  vector[J] e;
}
transformed parameters {
  vector[J] theta = mu + tau * e;
}
model {
  mu ~ normal(0, 5);
  tau ~ cauchy(0, 5);
  e ~ std_normal();
  y ~ normal(theta, sigma);
}
