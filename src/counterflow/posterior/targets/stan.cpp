// The C interface to a Stan model that Python calls. stanc's C++ for the model stands above this text in one file.
//
// Every function returns null, or the message of an error, which lives until the thread's next call. Arrays are
// row-major, one point a row. What a model prints is dropped.

#include <limits>
#include <sstream>
#include <string>

#include <stan/io/json/json_data.hpp>
#include <stan/model/model_base.hpp>
#include <stan/services/util/create_rng.hpp>

using Model = stan::model::model_base;
using Points = const double *;

namespace {

template <typename F>
const char *guarded(F body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception &error) {
    message = error.what();
  } catch (...) {
    message = "an unknown error";
  }
  return message.c_str();
}

Eigen::VectorXd row(Points points, long index, long size) {
  return Eigen::Map<const Eigen::VectorXd>(points + index * size, size);
}

}  // namespace

extern "C" {

const char *counterflow_open(const char *json, unsigned int seed, Model **model) {
  return guarded([&] {
    std::istringstream text(json);
    std::ostringstream said;
    stan::json::json_data data(text);
    *model = &new_model(data, seed, &said);
  });
}

void counterflow_close(Model *model) { delete model; }

// Names of unconstrained coordinates (what = 0), parameters (1) or all that write_array gives (2), each with a newline.
const char *counterflow_names(const Model *model, int what) {
  static thread_local std::string joined;
  std::vector<std::string> names;
  if (what == 0)
    model->unconstrained_param_names(names, false, false);
  else
    model->constrained_param_names(names, what == 2, what == 2);
  joined.clear();
  for (const auto &name : names)
    joined += name + "\n";
  return joined.c_str();
}

// log p (rows) with the Jacobian and all constants, and its gradient (rows, dim). A point that the model rejects has
// -inf, and a gradient of 0.
const char *counterflow_density(const Model *model, Points theta, long rows, long dim, double *value, double *gradient) {
  static thread_local stan::math::ChainableStack tape;  // Stan wants one for each thread
  return guarded([&] {
    std::ostringstream said;
    for (long i = 0; i < rows; ++i) {
      stan::math::nested_rev_autodiff freed_at_the_end;
      Eigen::Map<Eigen::VectorXd> slope(gradient + i * dim, dim);
      Eigen::Matrix<stan::math::var, -1, 1> x = row(theta, i, dim).cast<stan::math::var>();
      try {
        stan::math::var density = model->log_prob_jacobian(x, &said);
        density.grad();
        value[i] = density.val();
        slope = x.adj();
      } catch (const std::domain_error &) {
        value[i] = -std::numeric_limits<double>::infinity();
        slope.setZero();
      }
    }
  });
}

// Why the model rejects theta (dim).
const char *counterflow_reason(const Model *model, Points theta, long dim) {
  return guarded([&] {
    std::ostringstream said;
    Eigen::VectorXd x = row(theta, 0, dim);
    model->log_prob_jacobian(x, &said);
  });
}

// All that the model computes (rows, width): parameters, transformed parameters, generated quantities.
const char *counterflow_constrain(const Model *model, Points theta, long rows, long dim, long width, unsigned int seed,
                                  double *values) {
  return guarded([&] {
    std::ostringstream said;
    for (long i = 0; i < rows; ++i) {
      stan::rng_t random = stan::services::util::create_rng(seed, i + 1);
      Eigen::VectorXd x = row(theta, i, dim), all(width);
      model->write_array(random, x, all, true, true, &said);
      Eigen::Map<Eigen::VectorXd>(values + i * width, width) = all;
    }
  });
}

// theta (rows, dim) of parameters (rows, width).
const char *counterflow_unconstrain(const Model *model, Points values, long rows, long dim, long width, double *theta) {
  return guarded([&] {
    std::ostringstream said;
    for (long i = 0; i < rows; ++i) {
      Eigen::VectorXd x(dim);
      model->unconstrain_array(row(values, i, width), x, &said);
      Eigen::Map<Eigen::VectorXd>(theta + i * dim, dim) = x;
    }
  });
}

}  // extern "C"
