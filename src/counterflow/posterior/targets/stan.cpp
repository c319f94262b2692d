// C interface to a Stan model, called from Python. In the compiled file, stanc's C++ for the model precedes this text.
//
// Every function returns null, or an error message that is valid until the thread's next call. Arrays are row-major,
// one point per row. The model's printed output is dropped.

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
const char *catch_errors(F body) {
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
  return catch_errors([&] {
    std::istringstream text(json);
    std::ostringstream printed;
    stan::json::json_data data(text);
    *model = &new_model(data, seed, &printed);
  });
}

void counterflow_close(Model *model) { delete model; }

// Names of unconstrained coordinates (kind 0), parameters (1) or all variables of write_array (2), one per line.
const char *counterflow_names(const Model *model, int kind) {
  static thread_local std::string joined;
  std::vector<std::string> names;
  if (kind == 0)
    model->unconstrained_param_names(names, false, false);
  else
    model->constrained_param_names(names, kind == 2, kind == 2);
  joined.clear();
  for (const auto &name : names)
    joined += name + "\n";
  return joined.c_str();
}

// log p (rows) with the Jacobian and all constants, and its gradient (rows, dim). A point that the model rejects gets
// -inf and a gradient of 0.
const char *counterflow_density(const Model *model, Points theta, long rows, long dim, double *value, double *gradient) {
  static thread_local stan::math::ChainableStack tape;  // Stan needs one per thread
  return catch_errors([&] {
    std::ostringstream printed;
    for (long i = 0; i < rows; ++i) {
      stan::math::nested_rev_autodiff freed_at_the_end;
      Eigen::Map<Eigen::VectorXd> slope(gradient + i * dim, dim);
      Eigen::Matrix<stan::math::var, -1, 1> x = row(theta, i, dim).cast<stan::math::var>();
      try {
        stan::math::var density = model->log_prob_jacobian(x, &printed);
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

// The reason why the model rejects theta (dim); null if it does not.
const char *counterflow_reason(const Model *model, Points theta, long dim) {
  return catch_errors([&] {
    std::ostringstream printed;
    Eigen::VectorXd x = row(theta, 0, dim);
    model->log_prob_jacobian(x, &printed);
  });
}

// All variables (rows, width): parameters, transformed parameters, generated quantities.
const char *counterflow_constrain(const Model *model, Points theta, long rows, long dim, long width, unsigned int seed,
                                  double *values) {
  return catch_errors([&] {
    std::ostringstream printed;
    for (long i = 0; i < rows; ++i) {
      stan::rng_t random = stan::services::util::create_rng(seed, i + 1);
      Eigen::VectorXd x = row(theta, i, dim), all(width);
      model->write_array(random, x, all, true, true, &printed);
      Eigen::Map<Eigen::VectorXd>(values + i * width, width) = all;
    }
  });
}

// theta (rows, dim) of parameters (rows, width).
const char *counterflow_unconstrain(const Model *model, Points values, long rows, long dim, long width, double *theta) {
  return catch_errors([&] {
    std::ostringstream printed;
    for (long i = 0; i < rows; ++i) {
      Eigen::VectorXd x(dim);
      model->unconstrain_array(row(values, i, width), x, &printed);
      Eigen::Map<Eigen::VectorXd>(theta + i * dim, dim) = x;
    }
  });
}

}  // extern "C"
